"""Replaces itself by what cannot be executed, then by a program that answers nothing."""

import os


def f(x):
    for path in ("/nothing", "/etc/passwd", "/dev/null", "/box", "/bin/true", "/usr/bin/true"):
        try:
            os.execv(path, [path])
        except OSError:
            pass
    return 7


if __name__ == "__main__":
    os.write(1, b"7")
    f(0)
