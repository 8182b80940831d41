import os
for name in ("stdin", "stdout", "stderr", "fd", "null", "zero", "full", "random", "urandom"):
    path = f"/dev/{name}"
    print(name, os.path.islink(path), os.readlink(path) if os.path.islink(path) else oct(os.stat(path).st_mode))
