import sys
print("\ud800 \u2713", file=sys.stderr)
