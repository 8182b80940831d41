"""Uses as many seconds of CPU time as its argument says, and prints what the kernel says that it used."""

import sys
import time

while time.process_time() < float(sys.argv[1]):
    sum(range(1000))
print(time.process_time())
