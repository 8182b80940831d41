import os
for call in (lambda: os.ttyname(0), os.ctermid, os.getlogin, lambda: os.tcgetpgrp(0)):
    try:
        print(call())
    except OSError as error:
        print(type(error).__name__, error.errno)
