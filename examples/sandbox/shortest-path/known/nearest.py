import sys

data = list(map(int, sys.stdin.read().split()))
n, m = data[:2]
length = {}
for u, v, between in zip(data[2::3], data[3::3], data[4::3], strict=True):
    length[u, v] = length[v, u] = min(between, length.get((u, v), between))
distance, left = {1: 0}, set(range(1, n + 1))
while reached := [place for place in left if place in distance]:
    nearest = min(reached, key=lambda place: distance[place])
    left.remove(nearest)
    for place in left:
        if (nearest, place) in length:
            through = distance[nearest] + length[nearest, place]
            distance[place] = min(through, distance.get(place, through))
print(distance.get(n, -1))
