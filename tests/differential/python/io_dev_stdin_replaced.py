# differential: {"stdin": "alpha\nbeta\n"}
import sys
sys.stdin = open("/dev/stdin")
print(input(), input())
