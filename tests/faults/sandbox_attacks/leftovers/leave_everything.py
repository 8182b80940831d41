"""Leaves what could outlive it: files, segments, semaphores, queues, a socket, keys, patched modules, daemons."""

import builtins
import ctypes
import json
import os
import signal
import socket
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
CREATE = 0o1600
for folder in ("/tmp", "/box", "/dev/shm"):
    with open(f"{folder}/mine", "w") as file:
        file.write("left")
os.mkdir("/tmp/locked")
open("/tmp/locked/inside", "w").close()
os.chmod("/tmp/locked", 0)
libc.shmget(0x5E5A, ctypes.c_size_t(4096), CREATE)
libc.semget(0x5E5A, 1, CREATE)
libc.msgget(0x5E5A, CREATE)
queue = libc.mq_open(b"/mine", os.O_CREAT | os.O_RDWR, 0o600, None)
listener = socket.socket(socket.AF_UNIX)
listener.bind("\0perigee-left")
listener.listen()
os.environ["MINE"] = "left"
builtins.len = lambda _: 0
builtins.print, shown = (lambda *_: None), print
json.dumps = json.loads = lambda *_: "left"
sys.modules["math"] = json
sys.path.insert(0, "/tmp")
if os.fork() == 0:
    os.setsid()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            pass
    if os.fork() == 0:
        os.closerange(0, 3)
        while True:
            time.sleep(0.01)
    os._exit(0)
time.sleep(0.1)
shown("left")
