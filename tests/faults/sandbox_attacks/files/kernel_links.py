"""Leaves links to what the kernel shows of the process that follows them."""

import os

for name, target in {
    "memory": "/proc/self/mem", "environment": "/proc/self/environ", "root": "/proc/self/root/etc/shadow",
    "input": "/proc/self/fd/0", "descriptor": "/dev/fd/3", "first": "/proc/1/environ",
}.items():  # fmt: skip
    os.symlink(target, name)
os.symlink("/proc/self/root", "folder")
