# differential: {"stdin_repeat": ["some words in a line\n", 20000]}
print(sum(1 for _ in range(20000) if input()))
