import sys
for i in range(2000):
    print("out", i)
    print("err", i, file=sys.stderr)
