# differential: {"stdin": "x"}
import sys
for stream in (sys.stdin, sys.stdout, sys.stderr, sys.stdin.buffer, sys.stdin.buffer.raw, sys.stdout.buffer.raw):
    print(type(stream).__name__, stream.seekable(), stream.readable(), stream.writable(), stream.isatty())
