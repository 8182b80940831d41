import atexit, sys
atexit.register(lambda: print(repr(sys.last_value), sys.last_type))
raise ValueError("x")
