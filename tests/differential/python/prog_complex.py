import cmath
print((1 + 2j) ** 2, abs(3 + 4j), cmath.sqrt(-1), complex("1+2j"), 1j * 1j)
