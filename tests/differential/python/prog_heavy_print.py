# differential: {"stdin_repeat": ["7\n", 5000]}
import sys
for line in sys.stdin:
    print(int(line) * 2)
