import io
from contextlib import redirect_stdout
buffer = io.StringIO()
with redirect_stdout(buffer):
    print("hidden")
print(buffer.getvalue().upper())
