class A:
    def __init__(self, name): self.name = name
    def __del__(self): print("del", self.name)
a, b = A("a"), A("b")
c = [A("c")]
d = {"x": A("d")}
