import sys
class A:
    def __del__(self, stderr=sys.stderr): print("gone", file=stderr)
a = A()
