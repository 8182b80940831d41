import sys
print([m for m in sys.modules if m.startswith(("agent", "perigee", "box", "services"))])
