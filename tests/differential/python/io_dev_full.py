try:
    with open("/dev/full", "w") as full:
        full.write("x")
except OSError as error:
    print(error)
