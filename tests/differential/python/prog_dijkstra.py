# differential: {"stdin": "4 4\n1 2 5\n2 3 1\n1 3 9\n3 4 2\n"}
import heapq, sys
data = iter(sys.stdin.read().split())
n, m = int(next(data)), int(next(data))
g = [[] for _ in range(n + 1)]
for _ in range(m):
    a, b, w = int(next(data)), int(next(data)), int(next(data))
    g[a].append((b, w)); g[b].append((a, w))
dist = {1: 0}; heap = [(0, 1)]
while heap:
    d, u = heapq.heappop(heap)
    if d > dist[u]: continue
    for v, w in g[u]:
        if d + w < dist.get(v, 1 << 60):
            dist[v] = d + w; heapq.heappush(heap, (d + w, v))
print([dist[i] for i in range(1, n + 1)])
