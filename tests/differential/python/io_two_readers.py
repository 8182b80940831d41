# differential: {"stdin": "a b\nc d\n"}
import os
pid = os.fork()
if pid == 0:
    print(os.read(0, 4))
else:
    os.wait()
    print(os.read(0, 100))
