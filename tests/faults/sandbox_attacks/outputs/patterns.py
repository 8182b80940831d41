"""Prints what matches anything where it is taken for a pattern."""

print(".* .*")
print("* *")
print("%s %s")
