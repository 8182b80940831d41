"""Ends well before it prints the answer."""

import os

print("1 2")
os._exit(0)  # the text is still in the buffer
