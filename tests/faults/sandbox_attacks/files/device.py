"""Leaves a device, or a link to one where it may not make any."""

import os
import stat

for name, kind, device in (("out", stat.S_IFCHR, (1, 5)), ("disk", stat.S_IFBLK, (8, 0))):
    try:
        os.mknod(name, kind | 0o666, os.makedev(*device))
    except OSError:
        os.symlink("/dev/zero", name)
