import os, sys
print("one")
sys.stdout.flush()
try:
    os.lseek(1, 100, os.SEEK_SET)
except OSError as error:
    print(error)
print("two")
