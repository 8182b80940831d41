class A:
    def __init__(self, name): self.name = name
    def __del__(self): print("del", self.name, helper())
def helper(): return len(NAMES)
NAMES = ["x"]
a, b = A("a"), A("b")
