# differential: {"stdin": "5\n1 2 3 4 5\n"}
n, *values = open(0).read().split()
print(n, sum(map(int, values)))
