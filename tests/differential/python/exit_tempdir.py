import os, tempfile
d = tempfile.TemporaryDirectory()
print(os.path.isdir(d.name))
