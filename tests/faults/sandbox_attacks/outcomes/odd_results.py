"""Returns values whose every method raises, or that cannot be described."""


class Odd(list):
    def __getattribute__(self, name):
        raise SystemExit(0)

    def __iter__(self):
        raise KeyboardInterrupt

    def __len__(self):
        return -1

    def __reduce_ex__(self, protocol):
        raise GeneratorExit


class Text(str):
    def encode(self, *arguments, **keywords):
        raise MemoryError


def f(x):
    return Odd([x]) if x % 2 else {Text("\ud800"): Odd()}


if __name__ == "__main__":
    raise SystemExit(Text("\ud800" * 10))
