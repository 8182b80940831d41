# differential: {"env": {"PYTHONIOENCODING": "latin-1"}}
import sys
print(sys.stdout.encoding, "\xe9")
