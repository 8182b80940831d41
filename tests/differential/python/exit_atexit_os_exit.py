import atexit, os, sys
atexit.register(lambda: (sys.stdout.flush(), os._exit(9)))
print("body")
