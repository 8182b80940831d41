"""Connects to the abstract local socket in its first argument, which another job or the host listens on."""

import socket
import sys

for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    with socket.socket(socket.AF_UNIX, kind) as client:
        try:
            client.connect("\0" + sys.argv[1])
            print("connected")
        except OSError:
            pass
with open("/proc/net/unix") as file:
    if sys.argv[1] in file.read():
        print("listed")
print("held")
