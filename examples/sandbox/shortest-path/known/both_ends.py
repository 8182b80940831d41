import heapq
import sys

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
roads = [[] for _ in range(n + 1)]
for u, v, length in zip(data[2::3], data[3::3], data[4::3], strict=True):
    roads[u].append((v, length))
    roads[v].append((u, length))


def distances(start):
    found, heap = {}, [(0, start)]
    while heap:
        so_far, place = heapq.heappop(heap)
        if place not in found:
            found[place] = so_far
            for other, length in roads[place]:
                heapq.heappush(heap, (so_far + length, other))
    return found


from_start, from_goal = distances(1), distances(n)
print(min(from_start[place] + from_goal[place] for place in from_start if place in from_goal))
