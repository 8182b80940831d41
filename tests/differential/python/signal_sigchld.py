import os, signal, time
signal.signal(signal.SIGCHLD, lambda *a: print("child ended"))
if os.fork() == 0:
    os._exit(0)
os.wait()
