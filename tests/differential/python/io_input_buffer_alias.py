# differential: {"stdin": "3\n1\n2\n3\n"}
import sys
input = sys.stdin.buffer.readline
print(sum(int(input()) for _ in range(int(input()))), repr(input()))
