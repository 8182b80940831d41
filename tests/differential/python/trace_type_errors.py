for call in (lambda: "a" + 1, lambda: len(3), lambda: int([]), lambda: (lambda x: x)(), lambda: [1][None], lambda: 1(), lambda: sorted([1, "a"])):
    try:
        call()
    except TypeError as error:
        print(error)
