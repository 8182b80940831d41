import sys
sys.stdout.reconfigure(encoding="latin-1", line_buffering=True)
print("\xe9", sys.stdout.encoding, sys.stdout.line_buffering)
