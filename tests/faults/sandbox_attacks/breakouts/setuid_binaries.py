"""Runs programs that would run as root, and makes one."""

import os
import shutil
import stat
import subprocess

for folder, _, names in [*os.walk("/usr/bin"), *os.walk("/usr/sbin")]:
    for name in names:
        path = os.path.join(folder, name)
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID) and not os.statvfs(path).f_flag & os.ST_NOSUID:
            print(path, "would run as its owner")
for folder in ("/box", "/tmp", "/dev/shm"):
    copy = f"{folder}/id"
    shutil.copy("/usr/bin/id", copy)
    try:
        os.chmod(copy, 0o6755)
        os.chown(copy, 0, 0)
    except OSError:
        pass
    if not os.statvfs(copy).f_flag & os.ST_NOSUID:
        print(folder, "takes programs that run as their owner")
for command in (["su", "-c", "id -u"], ["unshare", "-r", "id", "-u"], ["newgrp", "root"], ["/tmp/id", "-u"]):
    try:
        output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20).stdout
    except OSError:
        continue
    if output.strip() == "0":
        print(command, "ran as root")
print("held")
