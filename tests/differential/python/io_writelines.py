import sys
sys.stdout.writelines(f"{i} " for i in range(5))
sys.stdout.buffer.write(b"bytes\n")
