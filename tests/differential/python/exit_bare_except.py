import sys
try:
    sys.exit(3)
except:
    print("swallowed")
