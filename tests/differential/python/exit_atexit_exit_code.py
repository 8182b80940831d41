import atexit, sys
atexit.register(print, "ran")
sys.exit(3)
