import threading
local, barrier, seen = threading.local(), threading.Barrier(3), []
def f(i):
    local.x = i; barrier.wait(); seen.append(local.x)
ts = [threading.Thread(target=f, args=(i,)) for i in range(3)]
[t.start() for t in ts]; [t.join() for t in ts]
print(sorted(seen))
