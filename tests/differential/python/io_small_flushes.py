import sys
for i in range(3000):
    sys.stdout.write(f"{i}\n")
    sys.stdout.flush()
