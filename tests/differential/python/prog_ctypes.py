import ctypes
libc = ctypes.CDLL(None)
print(libc.abs(-5), libc.strlen(b"four"))
libc.puts(b"buffered by the C library")
