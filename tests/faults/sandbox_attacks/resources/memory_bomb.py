"""Takes memory for ever."""

held = []
while True:
    held.append(bytearray(1 << 20))
