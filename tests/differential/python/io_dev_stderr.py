import sys
print("one", file=sys.stderr)
with open("/dev/stderr", "w") as out:
    out.write("two\n")
print("three", file=sys.stderr)
