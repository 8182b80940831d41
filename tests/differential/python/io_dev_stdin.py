# differential: {"stdin": "3 4\n"}
a, b = map(int, open("/dev/stdin").read().split())
print(a + b)
