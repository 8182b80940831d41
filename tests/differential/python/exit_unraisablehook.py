import sys
sys.unraisablehook = lambda info: print("hook", info.exc_value)
class A:
    def __del__(self): 1 / 0
A()
