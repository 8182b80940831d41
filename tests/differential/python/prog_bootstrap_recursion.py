from types import GeneratorType
def bootstrap(f, stack=[]):
    def wrapped(*args):
        if stack: return f(*args)
        to = f(*args)
        while True:
            if type(to) is GeneratorType:
                stack.append(to); to = next(to)
            else:
                stack.pop()
                if not stack: return to
                to = stack[-1].send(to)
    return wrapped
@bootstrap
def total(n):
    if n: yield n + (yield total(n - 1))
    yield 0
print(total(5000))
