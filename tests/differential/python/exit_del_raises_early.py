class A:
    def __del__(self): raise ValueError("early")
a = A()
del a
print("goes on")
