import math
print(0.1 + 0.2, 1e16, 1e-5, 1e22, 5e-324, float("inf"), float("nan"), -0.0, round(2.5), round(-1.005, 2), 7 // 0.5, math.fsum([0.1] * 10), f"{1e6:g} {12345.678:,.2f} {0.000012345:e}")
