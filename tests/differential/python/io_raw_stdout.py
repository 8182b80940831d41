import sys
sys.stdout.buffer.raw.write(b"raw first\n")
print("then text")
