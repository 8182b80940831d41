import sys

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
edges = list(zip(data[2::3], data[3::3], data[4::3], strict=True))
far = 10**9
distance = [far] * (n + 1)
distance[1] = 0
for _ in range(n):
    for u, v, length in edges:
        distance[v] = min(distance[v], distance[u] + length)
        distance[u] = min(distance[u], distance[v] + length)
print(distance[n] if distance[n] < far else -1)
