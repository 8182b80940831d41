# differential: {"stdin": "\u00e9\u2713"}
import sys
print(sys.stdin.buffer.read())
