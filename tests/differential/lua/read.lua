-- differential: {"stdin": "3 4\nrest"}
local a, b = io.read("n", "n"); print(a + b, a // b, a / b, io.read("a"))
