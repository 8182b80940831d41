import traceback
def f(): return [(s.filename, s.lineno, s.name) for s in traceback.extract_stack()]
print(f())
