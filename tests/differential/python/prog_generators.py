def g():
    got = []
    try:
        while True: got.append((yield len(got)))
    except GeneratorExit:
        print("closing", got); raise
    finally:
        print("finally")
x = g(); next(x); x.send("a"); print(x.send("b")); x.close()
def d(): return (yield from iter([1, 2]))
print(list(d()))
