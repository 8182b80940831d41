# differential: {"stdin": "a\nb\n\nc"}
for line in iter(input, ""):
    print(line)
try:
    print(input()); input()
except EOFError as error:
    print(error)
