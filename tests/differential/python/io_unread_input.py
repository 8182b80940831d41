# differential: {"stdin_repeat": ["never read\n", 30000]}
print("done")
