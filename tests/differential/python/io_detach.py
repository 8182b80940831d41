import sys
buffer = sys.stdout.detach()
buffer.write(b"detached\n")
buffer.flush()
