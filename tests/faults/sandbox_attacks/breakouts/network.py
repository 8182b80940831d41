"""Makes sockets of every family but the local one, and calls the service itself; its address is the first argument."""

import socket
import sys

host, port = sys.argv[1].rsplit(":", 1)
try:
    socket.create_connection((host, int(port)), timeout=5)
    print("connected to", sys.argv[1])
except OSError:
    pass
for family in set(range(64)) - {socket.AF_UNIX}:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        for protocol in (0, 1, 255):
            try:
                socket.socket(family, kind, protocol)
                print("socket", family, kind, protocol)
            except OSError:
                pass
            try:
                socket.socketpair(family, kind, protocol)
                print("socketpair", family, kind, protocol)
            except OSError:
                pass
left, right = socket.socketpair()
left.send(b"x")
print("held" if right.recv(1) == b"x" else "no local sockets")
