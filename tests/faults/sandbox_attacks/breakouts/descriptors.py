"""Looks for descriptors that were left open, and for folders of the host behind them."""

import os

open_ones = sorted(map(int, os.listdir("/proc/self/fd")))
if open_ones != [0, 1, 2, 3]:  # 3 is the listing's own
    print("open", open_ones)
for number in open_ones[:3]:
    try:
        os.chdir(f"/proc/self/fd/{number}")
        print("a folder is open", number)
    except OSError:
        pass
print("held")
