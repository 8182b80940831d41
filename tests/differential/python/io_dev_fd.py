# differential: {"stdin": "text\n"}
import os
print(open("/dev/fd/0").read(), end="")
os.write(1, b"")
open("/proc/self/fd/1", "w").write("by proc\n")
