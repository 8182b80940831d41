from datetime import date
x = 255
print(f"{x:#x} {x:#010b} {x!r:>6} {x:e} {x=} {date(2024, 2, 29):%A %d %B %Y} {'é':>3} {-5:+d} {1234567:_}", "{0[a]} {1.real}".format({"a": 1}, 2j))
