# differential: {"args": ["a"]}
import os, sys
print([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]])
