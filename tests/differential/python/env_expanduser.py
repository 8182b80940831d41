import os, pathlib
print(os.path.expanduser("~"), pathlib.Path.home())
