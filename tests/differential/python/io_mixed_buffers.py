import sys
sys.stdout.write("text ")
sys.stdout.buffer.write(b"bytes ")
sys.stdout.flush()
sys.stdout.write("text\n")
