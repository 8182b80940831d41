import atexit
atexit.register(print, "after")
atexit.register(lambda: [][1])
