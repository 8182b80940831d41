# differential: {"stdin": "5"}
import atexit, sys
lines = []
atexit.register(lambda: sys.stdout.write("".join(lines)))
for i in range(int(input())):
    lines.append(f"{i}\n")
