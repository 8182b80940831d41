# differential: {"stdin": "alpha\nbeta\n"}
print(input())
with open("/dev/stdin") as rest:
    print(repr(rest.read()))
