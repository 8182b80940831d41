import gzip, os
f = gzip.open("x.gz", "wt")
f.write("text")
print(os.path.exists("x.gz"))
