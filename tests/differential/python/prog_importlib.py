import importlib, sys, types
open("mod.py", "w").write("x = 1\nif __name__ == '__main__': x = 2\n")
importlib.invalidate_caches()
import mod, runpy
print(mod.x, mod.__file__, runpy.run_path("mod.py", run_name="__main__")["x"], importlib.reload(mod) is mod)
