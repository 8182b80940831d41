"""Leaves a file that nobody may read, in a folder that nobody may enter."""

import os

os.mkdir("folder")
for path in ("out", "folder/out"):
    with open(path, "w") as file:
        file.write("own")
    os.chmod(path, 0)
os.chmod("folder", 0)
