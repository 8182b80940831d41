"""Each process forks the next one and ends, so that whoever kills by process id is always too late."""

import os

if os.fork() == 0:
    os.setsid()
    while True:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            pass
print("held")
