a = list(range(10))
a[2:5] = [0]; a[::2] = [9] * len(a[::2]); del a[-1:]
print(a, a[5:1:-2], slice(None, 5).indices(3))
