import sys
def depth():
    frame, n = sys._getframe(), 0
    while frame:
        n, frame = n + 1, frame.f_back
    return n
print(depth())
