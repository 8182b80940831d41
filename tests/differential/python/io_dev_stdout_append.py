print("one", flush=True)
with open("/dev/stdout", "a") as out:
    out.write("two\n")
print("three")
