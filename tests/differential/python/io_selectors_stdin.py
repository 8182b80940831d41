# differential: {"stdin": "a\nb\n"}
import os, selectors, sys
selector = selectors.DefaultSelector()
selector.register(sys.stdin, selectors.EVENT_READ)
chunks = []
while selector.select():
    chunk = os.read(0, 1024)
    if not chunk:
        break
    chunks.append(chunk)
print(b"".join(chunks))
