# differential: {"env": {"PYTHONSAFEPATH": "1"}}
import sys
print("/box" in sys.path)
