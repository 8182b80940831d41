import multiprocessing as m
def f(): raise ValueError("in the child")
if __name__ == "__main__":
    p = m.get_context("fork").Process(target=f, name="P"); p.start(); p.join(); print(p.exitcode)
