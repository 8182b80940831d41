import sys
from collections import deque

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
roads = [[] for _ in range(n + 1)]
for u, v, length in zip(data[2::3], data[3::3], data[4::3], strict=True):
    roads[u].append((v, length))
    roads[v].append((u, length))
distance, waiting = {1: 0}, deque([1])
while waiting:
    place = waiting.popleft()
    for other, length in roads[place]:
        if distance[place] + length < distance.get(other, 10**9):
            distance[other] = distance[place] + length
            waiting.append(other)
print(distance.get(n, -1))
