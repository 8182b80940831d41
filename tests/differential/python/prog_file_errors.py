import os
for call in (lambda: open("x/y", "w"), lambda: os.mkdir("/usr"), lambda: os.rmdir("/"), lambda: open("."), lambda: os.listdir("nope"), lambda: open("a\0b")):
    try: call()
    except (OSError, ValueError) as error: print(type(error).__name__, error)
