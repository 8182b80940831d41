import heapq
import sys

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
roads = [[] for _ in range(n + 1)]
for u, v, length in zip(data[2::3], data[3::3], data[4::3], strict=True):
    roads[u].append((v, length))
    roads[v].append((u, length))
done, heap = {}, [(0, 1)]
while heap:
    distance, place = heapq.heappop(heap)
    if place in done:
        continue
    done[place] = distance
    for other, length in roads[place]:
        heapq.heappush(heap, (distance + length, other))
print(done.get(n, -1))
