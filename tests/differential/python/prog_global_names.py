def f():
    global g
    g = locals(), sorted(k for k in globals() if k[0] != "_")
f(); print(g, dir() == sorted(globals()))
