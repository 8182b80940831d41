# differential: {"stdin_repeat": ["line of text\n", 30000]}
head -n 1
