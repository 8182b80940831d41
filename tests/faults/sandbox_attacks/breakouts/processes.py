"""Looks for processes other than its own and the first one of its box, and into the first one."""

import os

others = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1, os.getpid()}
if others:
    print("sees", sorted(others))
for name in "mem maps environ fd cwd root exe stack syscall auxv ns map_files fdinfo".split():
    path = f"/proc/1/{name}"
    for look in (os.listdir, os.readlink, lambda path: open(path, "rb").read(1)):
        try:
            print("reached", path, look(path))
        except OSError:
            pass
print("held")
