s = "Straße ǆ İ ﬁ"
print(s.upper(), s.lower(), s.title(), s.casefold(), s.swapcase(), len(s), s.encode(), s.center(30, "*"), "a,b,,c".split(","), " x ".strip() + "|", "abc"[::-1], "%5.2f|%-5s|%05d" % (3.14159, "ab", 42))
