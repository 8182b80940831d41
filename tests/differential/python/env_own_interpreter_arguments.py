# differential: {"env": {"PYTHONNODEBUGRANGES": "1"}, "args": ["a b", ""], "stdin": "in"}
import sys
print(sys.argv, input())
1 / 0
