import __main__, sys
x = 5
print(__main__.x, sys.modules["__main__"] is __main__, __main__)
