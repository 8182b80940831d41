import sys

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
roads = [[] for _ in range(n + 1)]
for u, v, length in zip(data[2::3], data[3::3], data[4::3], strict=True):
    roads[u].append((v, length))
    roads[v].append((u, length))
buckets = [[] for _ in range(41 * (n + 1))]
buckets[0].append(1)
done = {}
for distance, bucket in enumerate(buckets):
    for place in bucket:
        if place in done:
            continue
        done[place] = distance
        for other, length in roads[place]:
            buckets[distance + length].append(other)
print(done.get(n, -1))
