import sys
print([p for p in sys.path])
