from multiprocessing import shared_memory
m = shared_memory.SharedMemory(create=True, size=16)
m.buf[:3] = b"abc"; n = shared_memory.SharedMemory(m.name); print(bytes(n.buf[:3])); n.close(); m.close(); m.unlink()
