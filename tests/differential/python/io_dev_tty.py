import errno
try:
    open("/dev/tty")
except OSError as error:
    print(errno.errorcode[error.errno], error)
