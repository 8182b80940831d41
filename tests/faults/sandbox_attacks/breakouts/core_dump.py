"""Aborts children and looks for the core files they leave."""

import os
import resource

for value in (resource.RLIM_INFINITY, 1 << 20, 1):
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (value, value))
        print("core dumps up to", value)
    except (OSError, ValueError):
        pass
for folder in ("/box", "/tmp", "/dev/shm"):
    os.chdir(folder)
    if os.fork() == 0:
        os.abort()
    os.wait()
    for name in os.listdir("."):
        if "core" in name:
            print("left", folder, name)
print("held")
