import sys
print("still here")
sys.modules.clear()
