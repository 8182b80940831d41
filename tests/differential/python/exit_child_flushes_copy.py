import os
print("buffered twice")
if os.fork() == 0:
    raise SystemExit
os.wait()
