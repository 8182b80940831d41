import os, sys
os._exit = None
sys.exit = None
print(1)
