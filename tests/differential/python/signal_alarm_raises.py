import signal
class Timeout(Exception): pass
def handler(*a): raise Timeout
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.02)
try:
    while True: pass
except Timeout:
    print("timed out")
