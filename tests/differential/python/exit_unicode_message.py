import sys
sys.exit("\u00e9\u2713\ud800")
