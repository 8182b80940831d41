import multiprocessing as m, sys
def f(): sys.exit(3)
if __name__ == "__main__":
    p = m.get_context("fork").Process(target=f); p.start(); p.join(); print(p.exitcode)
