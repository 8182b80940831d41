import warnings
def f(): warnings.warn("careful", UserWarning, stacklevel=2)
f()
warnings.warn("gone", DeprecationWarning)
