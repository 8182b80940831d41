import os
os.remove("main.py")
1 / 0
