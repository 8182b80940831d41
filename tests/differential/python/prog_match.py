def f(x):
    match x:
        case {"k": [a, *rest]}: return a, rest
        case int() | float() if x > 5: return "big"
        case [1, 2] | (3, 4): return "pair"
        case str(s): return s
        case _: return None
print(f({"k": [1, 2, 3]}), f(7), f([3, 4]), f("z"), f(None))
