"""Leaves many files that are together larger than any answer can be."""

for index in range(40):
    with open(f"out{index}", "wb") as file:
        file.write(bytes([65 + index]) * (1 << 20))
