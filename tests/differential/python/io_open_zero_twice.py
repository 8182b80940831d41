# differential: {"stdin": "one\ntwo\nthree\n"}
print(input())
print(repr(open(0, closefd=False).read()))
