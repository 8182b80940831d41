import os, sys, weakref
class Gone: pass
class Lying:
    @property
    def __class__(self): raise RuntimeError("asked for a class")
sys.kept = weakref.proxy(Gone()), Lying(), os.fdopen(os.dup(1), "w")
sys.kept[2].write("kept")
