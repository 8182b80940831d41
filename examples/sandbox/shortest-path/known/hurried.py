import heapq
import sys

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
roads = [[] for _ in range(n + 1)]
for u, v, length in zip(data[2::3], data[3::3], data[4::3], strict=True):
    roads[u].append((v, length))
    roads[v].append((u, length))
distance, heap = {1: 0}, [(0, 1)]
while heap:
    so_far, place = heapq.heappop(heap)
    for other, length in roads[place]:
        if other not in distance:
            distance[other] = so_far + length
            heapq.heappush(heap, (distance[other], other))
print(distance.get(n, -1))
