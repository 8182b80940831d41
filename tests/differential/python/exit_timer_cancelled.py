import threading
t = threading.Timer(60, print, ["never"])
t.start()
t.cancel()
print("over")
