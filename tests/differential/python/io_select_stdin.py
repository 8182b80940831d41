# differential: {"stdin": "ready"}
import select, sys
print(bool(select.select([sys.stdin], [], [], 5)[0]), sys.stdin.read())
