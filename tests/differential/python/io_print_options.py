print(1, 2, 3, sep="-", end="!\n")
print(*"abc", sep="\n")
print("x" * 3, flush=True)
print()
