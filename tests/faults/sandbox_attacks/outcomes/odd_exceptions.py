"""Raises what cannot be described: exceptions that raise, that are no exceptions, that have no end."""


class Odd(BaseException):
    def __str__(self):
        raise self

    __repr__ = __str__

    def __getattribute__(self, name):
        raise self


class Meta(type):
    def __getattribute__(cls, name):
        raise Odd


class Group(Exception, metaclass=Meta):
    pass


def f(x):
    error = Odd()
    error.__context__ = None
    raise (Odd if x % 2 else Group)("x" * (1 << 20))


if __name__ == "__main__":
    f(0)
