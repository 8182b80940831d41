# differential: {"stdin": "abc"}
import sys
for call in (sys.stdin.tell, lambda: sys.stdin.seek(0), lambda: sys.stdin.buffer.seek(1)):
    try:
        print(call())
    except Exception as error:
        print(type(error).__name__, error)
