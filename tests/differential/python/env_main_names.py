print(__name__, __doc__, __package__, __spec__, __annotations__, __file__, __cached__, type(__loader__).__name__, __builtins__)
