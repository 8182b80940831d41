import threading, os
print(threading.get_native_id() == os.getpid(), threading.main_thread().ident == threading.get_ident())
