import os, sys
print("told")
sys.stdout.flush()
os._exit(4)
