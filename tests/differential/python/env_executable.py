import os, sys
print(os.path.basename(os.path.realpath(sys.executable)), sys.prefix, sys.base_prefix, sys.exec_prefix)
