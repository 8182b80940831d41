"""Prints a map: sparse ones, where the goal may be out of reach, and dense ones, larger with the index."""

import random
import sys

from cyaron import Graph

index, seed = int(sys.argv[1]), int(sys.argv[2])
random.seed(seed)  # cyaron draws from random
places = 2 + index // 2 + random.randint(0, 3)
most = places * (places - 1) // 2
roads = min(most, random.choice([places // 2, places, 3 * places]))
graph = Graph.graph(places, roads, directed=False, weight_limit=(1, 40), self_loop=False, repeated_edges=False)
print(places, roads)
print(graph)
