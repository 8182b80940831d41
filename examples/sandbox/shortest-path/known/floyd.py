import sys

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
far = 10**9
distance = [[0 if u == v else far for v in range(n + 1)] for u in range(n + 1)]
for u, v, length in zip(data[2::3], data[3::3], data[4::3], strict=True):
    distance[u][v] = distance[v][u] = min(length, distance[u][v])
for k in range(1, n + 1):
    for u in range(1, n + 1):
        for v in range(1, n + 1):
            distance[u][v] = min(distance[u][v], distance[u][k] + distance[k][v])
print(distance[1][n] if distance[1][n] < far else -1)
