"""Takes memory in ten processes, each of them below the limit; the parent ends well."""

import os
import time

for _ in range(10):
    if os.fork() == 0:
        held = bytearray(b"x") * (12 << 20)
        time.sleep(2)
        os._exit(0)
for _ in range(10):
    os.wait()
print("survived", flush=True)
