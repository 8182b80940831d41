import sys
print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits())
