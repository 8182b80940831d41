# differential: {"stdin": "3 4\n"}
import io, sys
out = io.TextIOWrapper(sys.stdout.buffer)
a, b = map(int, input().split())
out.write(f"{a + b}\n")
