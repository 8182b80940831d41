# differential: {"stdin": "0123456789"}
import sys
view = bytearray(4)
print(sys.stdin.buffer.readinto(view), view, sys.stdin.buffer.peek(3)[:3], sys.stdin.buffer.read1(2))
