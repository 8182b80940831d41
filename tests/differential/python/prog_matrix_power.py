def mul(a, b): return [[sum(x * y for x, y in zip(r, c)) % 1000007 for c in zip(*b)] for r in a]
r, m, n = [[1, 0], [0, 1]], [[1, 1], [1, 0]], 10**18
while n:
    if n & 1: r = mul(r, m)
    m = mul(m, m); n >>= 1
print(r)
