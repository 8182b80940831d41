"""Writes heads of replies that promise more than comes, with every kind, then ends well."""

import os
import stat


def f(x):
    for descriptor in range(3, 50):
        try:
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"".join(b"\0\0\0\7" + bytes([kind]) for kind in range(256)))
        except OSError:
            pass
    os._exit(0)
