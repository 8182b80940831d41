"""Uses as many seconds of CPU time as its argument says, in two children at once, and prints what all of them used."""

import os
import sys
import time

fraction = float(sys.argv[1]) / 2
reads, writes = os.pipe()
for _ in range(2):
    if os.fork() == 0:
        start = time.process_time()
        while time.process_time() - start < fraction:
            sum(range(1000))
        os.write(writes, f"{time.process_time()}\n".encode())
        os._exit(0)
for _ in range(2):
    os.wait()
os.close(writes)
report = sum(map(float, os.read(reads, 4096).split()))
print(report + time.process_time())
