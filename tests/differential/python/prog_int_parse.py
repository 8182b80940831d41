for text in ("1_000", " 12 ", "-0", "+5", "\u0663", "1.0", "0x1f", "", "1__0"):
    try:
        print(int(text), end=" ")
    except ValueError as error:
        print(error)
