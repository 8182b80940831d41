"""Aborts children and looks for the core files they leave; at a limit of 0 the host's handler would be started."""

import os
import resource

for value in (resource.RLIM_INFINITY, 1 << 20, 0):
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (value, value))
    except (OSError, ValueError):
        pass
    if resource.getrlimit(resource.RLIMIT_CORE) != (1, 1):
        print("core dumps up to", resource.getrlimit(resource.RLIMIT_CORE))
for folder in ("/box", "/tmp", "/dev/shm"):
    os.chdir(folder)
    if os.fork() == 0:
        os.abort()
    os.wait()
    for name in os.listdir("."):
        if "core" in name:
            print("left", folder, name)
print("held")
