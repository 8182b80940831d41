from decimal import *
getcontext().prec = 50
print(Decimal(1) / 7, Decimal(2).sqrt(), Decimal("1.10") + Decimal("2.2"), Decimal("NaN"), getcontext())
try:
    Decimal(1) / 0
except DivisionByZero as error: print(repr(error))
