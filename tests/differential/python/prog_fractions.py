from fractions import Fraction as F
print(F(3, 6) + F("0.125"), F(0.1).limit_denominator(100), sum(F(1, n) for n in range(1, 20)))
