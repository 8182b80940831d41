# differential: {"env": {"PYTHONPATH": "/box/lib"}}
import os
import sys
print(os.environ["PYTHONPATH"].split(":")[0] == sys.path[1])
