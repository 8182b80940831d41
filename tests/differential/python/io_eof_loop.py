# differential: {"stdin": "1\n2\n3"}
total = 0
while True:
    try:
        total += int(input())
    except EOFError:
        break
print(total)
