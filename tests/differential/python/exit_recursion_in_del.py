class A:
    def __del__(self):
        def f(): f()
        try: f()
        except RecursionError: print("deep")
a = A()
del a
print("on")
