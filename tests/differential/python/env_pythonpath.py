# differential: {"env": {"PYTHONPATH": "/box/lib"}}
import sys
import os
print(os.environ["PYTHONPATH"] == sys.path[1])
