"""Is no function at all, but says that it can be called."""


class Caller(type):
    def __call__(cls, *arguments, **names):
        return cls


class f(metaclass=Caller):
    def __eq__(self, other):
        return True
