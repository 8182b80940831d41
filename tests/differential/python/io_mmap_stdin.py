# differential: {"stdin": "abc"}
import mmap
try:
    mmap.mmap(0, 3, access=mmap.ACCESS_READ)
except (OSError, ValueError) as error:
    print(type(error).__name__)
