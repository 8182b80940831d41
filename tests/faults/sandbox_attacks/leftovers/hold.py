"""Has a secret in its input, its files, its environment, its arguments and its memory, and waits for company."""

import os
import socket
import time

key = input()
for folder in ("/tmp", "/box", "/dev/shm"):
    with open(f"{folder}/key", "w") as file:
        file.write(key)
os.environ["KEY"] = key
listener = socket.socket(socket.AF_UNIX)
listener.bind("\0" + key)
listener.listen()
print(len(key), flush=True)
time.sleep(90)
