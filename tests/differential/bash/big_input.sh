# differential: {"stdin_repeat": ["line of text\n", 30000]}
wc -lc; echo done
