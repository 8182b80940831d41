import threading
n, lock = 0, threading.Lock()
def f():
    global n
    for _ in range(1000):
        with lock: n += 1
ts = [threading.Thread(target=f) for _ in range(8)]
[t.start() for t in ts]; [t.join() for t in ts]
print(n, threading.active_count(), threading.main_thread().name, threading.current_thread() is threading.main_thread())
