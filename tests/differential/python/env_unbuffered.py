# differential: {"env": {"PYTHONUNBUFFERED": "1"}}
import os, sys
print("first")
os.write(1, b"second\n")
print(sys.stdout.write_through)
