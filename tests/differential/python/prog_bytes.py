b = bytes(range(250, 256)) + "é".encode()
print(b, b.hex(":"), bytearray(b)[::2], memoryview(b)[1:3].tolist(), b"%d-%s" % (5, b"x"), b.decode("latin-1"), int.from_bytes(b[:4], "little"))
