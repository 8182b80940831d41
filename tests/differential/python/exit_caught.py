import sys
try:
    sys.exit(3)
except SystemExit as stop:
    print("caught", stop.code)
