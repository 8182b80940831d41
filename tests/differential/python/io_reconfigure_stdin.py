# differential: {"stdin": "x"}
import sys
sys.stdin.reconfigure(errors="replace", encoding="ascii")
print(sys.stdin.read(), sys.stdin.encoding, sys.stdin.errors)
