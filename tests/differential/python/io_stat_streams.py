# differential: {"stdin": "x"}
import os, stat
for fd in range(3):
    mode = os.fstat(fd).st_mode
    print(fd, stat.S_ISFIFO(mode), stat.S_ISREG(mode), os.isatty(fd))
