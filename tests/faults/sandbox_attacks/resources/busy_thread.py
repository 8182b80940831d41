"""Ends its main thread and computes for ever in another one."""

import threading


def spin():
    while True:
        pass


threading.Thread(target=spin).start()
