class A: pass
def f(): pass
print(A(), f, A.__init__, print, lambda: 0, (i for i in ""), iter([]), range(5), type, NotImplemented, ...)
