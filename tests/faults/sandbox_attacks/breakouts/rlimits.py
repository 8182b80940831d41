"""Raises its own resource limits and changes those of the box's first process."""

import ctypes
import resource

for name in dir(resource):
    if not name.startswith("RLIMIT_"):
        continue
    kind = getattr(resource, name)
    soft, hard = resource.getrlimit(kind)
    for value in (resource.RLIM_INFINITY, hard + 1 if hard != resource.RLIM_INFINITY else None):
        if value is None or hard == resource.RLIM_INFINITY:
            continue
        try:
            resource.setrlimit(kind, (value, value))
            if resource.getrlimit(kind)[1] != hard:
                print("raised", name)
        except (ValueError, OSError):
            pass
    try:
        if kind != resource.RLIMIT_CORE:  # which seems to succeed and has no effect
            resource.prlimit(1, kind, (0, 0))
            print("changed the first process's", name)
    except OSError:
        pass
for name, most in {"RLIMIT_CORE": 1, "RLIMIT_MEMLOCK": 1 << 20, "RLIMIT_NOFILE": 65536, "RLIMIT_NPROC": 4096}.items():
    hard = resource.getrlimit(getattr(resource, name))[1]
    if hard == resource.RLIM_INFINITY or hard > most:
        print(name, "is", hard)
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(8 << 20)
if libc.mlock(buffer, ctypes.c_size_t(8 << 20)) == 0 or libc.mlockall(3) == 0:
    print("locked memory")
print("held")
