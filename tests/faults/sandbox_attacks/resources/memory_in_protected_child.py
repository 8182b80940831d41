"""Takes memory in a child that made itself the last one to be killed, while the parent ends well."""

import os

for score in ("-1000", "0"):
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(score)
    except OSError:
        pass
if os.fork() == 0:
    held = []
    while True:
        held.append(bytearray(1 << 20))
os.wait()
print("survived")
