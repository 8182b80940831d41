import sys
lines = []
def tracer(frame, event, arg):
    lines.append((frame.f_code.co_name, event)); return tracer
def f(): return 1
sys.settrace(tracer); f(); sys.settrace(None)
print(lines)
