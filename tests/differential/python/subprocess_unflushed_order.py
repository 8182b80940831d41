import os
print("printed first, seen last")
os.system("echo second")
