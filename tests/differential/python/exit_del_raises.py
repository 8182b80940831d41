class A:
    def __del__(self): raise ValueError("in the end")
a = A()
