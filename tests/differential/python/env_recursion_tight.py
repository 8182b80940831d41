import sys
def f(n): return 0 if n == 0 else 1 + f(n - 1)
sys.setrecursionlimit(5010)
print(f(5000))
