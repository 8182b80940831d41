from collections import *
c = Counter("abracadabra")
d = defaultdict(list); d["a"].append(1)
q = deque(range(5), 3); q.rotate(1)
o = OrderedDict(a=1, b=2); o.move_to_end("a")
print(c.most_common(2), c - Counter("aab"), d, q, o, ChainMap({"a": 1}, {"a": 2})["a"])
