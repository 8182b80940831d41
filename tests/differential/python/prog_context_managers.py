from contextlib import *
@contextmanager
def c(n):
    print("in", n)
    try: yield n
    except ValueError as e: print("saw", e)
    finally: print("out", n)
with c(1) as a, c(2) as b: raise ValueError("v")
with ExitStack() as s: [s.enter_context(c(i)) for i in range(2)]
with suppress(KeyError): {}[1]
