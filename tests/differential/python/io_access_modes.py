import fcntl, os
for fd in range(3):
    print(fd, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND))
