x = 3**5000
print(x % 10**20, x.bit_length(), hex(x)[:20], pow(7, -1, 1000007), int("f" * 300, 16) & 0xFFFF, -7 // 2, -7 % 3, divmod(-7, 3))
