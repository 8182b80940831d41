import queue, threading
q, out = queue.Queue(), []
def work():
    while (x := q.get()) is not None: out.append(x * x)
t = threading.Thread(target=work); t.start()
for i in range(10): q.put(i)
q.put(None); t.join()
print(out)
