"""Signals everything that it can name but itself, the box's first process before all."""

import os
import signal

for number in sorted(signal.valid_signals()):
    try:
        os.kill(1, number)
        print("signalled the first process by", number)
    except PermissionError:
        pass
for pid in range(1, 2000):
    if pid == os.getpid():
        continue
    for reach in (os.kill, os.killpg):
        try:
            reach(pid, 0)
            print("reached", pid)
        except OSError:
            pass
try:
    signal.pidfd_send_signal(os.pidfd_open(1), signal.SIGKILL)
    print("signalled by descriptor")
except OSError:
    pass
try:
    os.kill(-1, signal.SIGTERM)  # everything that it may, itself left out
    print("signalled others")
except OSError:
    pass
print("held")
