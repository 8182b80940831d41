import pickle
class A:
    def __init__(self): self.x = [self]
a = pickle.loads(pickle.dumps(A()))
print(a.x[0] is a, type(a), pickle.dumps(len))
