import signal
for s in sorted(signal.valid_signals()):
    handler = signal.getsignal(s)
    if handler not in (signal.SIG_DFL,):
        print(int(s), handler)
