compile("def f(:\n  pass", "inner.py", "exec")
