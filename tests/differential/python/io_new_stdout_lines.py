import sys
sys.stdout = open(sys.stdout.fileno(), "w", buffering=1)
print("by lines")
