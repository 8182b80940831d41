"""What runs at the box's side: the slot's launcher, the agent (PID 1 of a box) and the program's own process.

This package is run by the box's Python interpreter, which need not be the service's, so it imports the standard
library alone. It knows nothing of requests, verdicts or expected outputs.
"""
