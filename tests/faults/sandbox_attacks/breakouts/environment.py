"""Looks for variables of the service's environment; its arguments are their names."""

import os
import sys

for name in sys.argv[1:]:
    if name in os.environ:
        print("inherited", name)
for process in filter(str.isdigit, os.listdir("/proc")):
    if int(process) != os.getpid():
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                print("read the environment of", process, file.read(1))
        except OSError:
            pass
print("held")
