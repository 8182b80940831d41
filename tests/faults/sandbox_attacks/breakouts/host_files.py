"""Looks for the host's files, along every path that could lead to them, and tries to change what is shared.

The first argument is a file of the host that everybody may read, the second the host's name.
"""

import os
import socket
import sys

secret, host_name = sys.argv[1:]
up = "../" * 40
ways = ["", f"/{up}", "/proc/self/root", "/proc/1/root", f"/proc/1/cwd/{up}", f"/proc/self/cwd/{up}"]
ways += [f"/proc/self/fd/{descriptor}/{up}" for descriptor in range(64)]
ways += [f"/proc/1/fd/{descriptor}/{up}" for descriptor in range(64)]
outside = [
    "/etc/shadow", "/etc/ssh", "/etc/hostname", "/root", "/var/lib", "/var/log", "/run/perigee", "/proc/kcore",
    "/proc/kmsg", "/proc/1/environ", "/proc/1/mem", "/proc/1/maps", "/proc/1/fd", "/proc/keys", "/dev/sda", "/dev/vda",
    "/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/userfaultfd", "/sys/kernel", "/sys/fs/cgroup",
]  # fmt: skip
for path in [*outside, *(way + secret for way in ways)]:
    try:
        if os.path.isdir(path):
            if not os.listdir(path):
                continue
        else:
            with open(path, "rb") as file:
                if not file.read(1):
                    continue
        print("reached", path)
    except OSError:
        pass
if os.path.isdir("/home") and os.listdir("/home") != ["user"]:  # a link to the working folder
    print("reached", "/home")
for path in "/ /usr /usr/bin /usr/lib /lib /etc /dev /run /var /proc /proc/sys/kernel /sys".split():
    try:
        with open(f"{path}/mine", "w"):
            print("wrote below", path)
    except OSError:
        pass
kernel = ["/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger"]
for path in ["/usr/bin/env", "/etc/passwd", *kernel]:
    for change in (lambda path: open(path, "r+b"), lambda path: os.chmod(path, 0o777), os.unlink):
        try:
            change(path)
            print("changed", path)
        except OSError:
            pass
if socket.gethostname() == host_name:
    print("host name", host_name)
print("held")
