"""Leaves a local socket, with a listener that never answers."""

import os
import socket
import time

listener = socket.socket(socket.AF_UNIX)
listener.bind("out")
listener.listen()
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
