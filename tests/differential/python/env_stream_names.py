import sys
for s in (sys.stdin, sys.stdout, sys.stderr):
    print(s, s.buffer.name, s.mode, s.newlines, s.line_buffering, s.write_through, s.buffer.raw)
