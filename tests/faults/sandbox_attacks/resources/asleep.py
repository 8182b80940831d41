"""Waits for ever without using CPU time."""

import time

time.sleep(600)
