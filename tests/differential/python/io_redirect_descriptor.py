import os
saved = os.dup(1)
out = os.open("out.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
os.dup2(out, 1)
print("into the file", flush=True)
os.system("echo from a child")
os.dup2(saved, 1)
print(open("out.txt").read())
