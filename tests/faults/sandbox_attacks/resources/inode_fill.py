"""Makes empty files in the folder of its first argument for as long as there are inodes."""

import errno
import sys

made = 0
try:
    for made in range(100_000):
        open(f"{sys.argv[1]}/{made}", "w").close()
except OSError as error:
    if error.errno != errno.ENOSPC:
        print(error)
if made > 5000:
    print("made", made)
print("held")
