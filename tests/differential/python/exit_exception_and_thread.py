import threading, time
def f():
    time.sleep(0.05)
    print("thread last")
threading.Thread(target=f).start()
raise ValueError("main")
