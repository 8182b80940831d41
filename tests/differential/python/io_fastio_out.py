# differential: {"stdin": "2\n10\n20\n"}
import atexit, io, sys
buffer = io.BytesIO()
sys.stdout = io.TextIOWrapper(buffer)
@atexit.register
def write():
    sys.stdout.flush()
    sys.__stdout__.write(buffer.getvalue().decode())
for _ in range(int(input())):
    print(int(input()) * 2)
