"""Sends the head of a reply at once and the rest byte by byte, as long as it likes."""

import os
import time


def f(x):
    answer = str(2 * x).encode()
    os.write(3, len(answer).to_bytes(4, "big") + b"v")
    for byte in b" " * 8 + answer:
        time.sleep(0.25)
        os.write(3, bytes([byte]))
    return 2 * x
