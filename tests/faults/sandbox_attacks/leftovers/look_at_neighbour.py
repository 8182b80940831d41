"""Searches for another job's secret that runs at the same time: files, processes, sockets, shared memory."""

import os

needle = "".join(["ses", "ame"]).encode()
seen = []
for folder in ("/tmp", "/box", "/dev/shm", "/run", "/var/tmp"):
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb") as file:
                if needle * 2 in file.read():
                    seen.append(file.name)
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("cmdline", "environ", "comm", "maps", "stat"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                if needle * 2 in file.read():
                    seen.append(file.name)
        except OSError:
            pass
for path in ("/proc/net/unix", "/proc/sysvipc/shm", "/proc/locks", "/proc/self/mountinfo"):
    try:
        with open(path, "rb") as file:
            if needle * 2 in file.read():
                seen.append(path)
    except OSError:
        pass
print(seen or "held")
