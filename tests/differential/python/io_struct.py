import struct, sys
sys.stdout.buffer.write(struct.pack(">IhQ", 1, -2, 3))
