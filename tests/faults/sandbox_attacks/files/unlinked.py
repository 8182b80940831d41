"""Takes its own folder away from under itself."""

import os
import shutil

with open("out", "w") as file:
    file.write("own")
for path in os.listdir("."):
    os.unlink(path)
try:
    os.rmdir("/box")
except OSError:
    pass
shutil.rmtree("/tmp", ignore_errors=True)
