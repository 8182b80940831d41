# differential: {"stdin_repeat": ["12345 67890\n", 30000]}
import sys
data = sys.stdin.buffer.read().split()
print(len(data), sum(map(int, data)))
