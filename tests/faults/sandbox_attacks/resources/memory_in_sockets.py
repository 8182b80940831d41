"""Fills socket buffers, and hides each full socket in the buffer of the next so that few descriptors are open."""

import array
import socket

held, kept = 0, []
try:
    for _ in range(2000):
        left, right = socket.socketpair()
        left.setblocking(False)
        if kept:
            rights = array.array("i", [kept.pop().fileno()])
            left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        try:
            while True:
                held += left.send(b"x" * 65536)
        except BlockingIOError:
            pass
        kept.append(right)
except OSError:
    pass
print("held" if held < 128 << 20 else f"took {held}")
