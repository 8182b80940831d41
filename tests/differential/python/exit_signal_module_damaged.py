import gc, signal, threading
signal.signal = gc.collect = gc.get_objects = threading._shutdown = None
print("printed")
