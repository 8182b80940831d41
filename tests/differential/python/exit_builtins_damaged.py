import builtins
print("printed")
builtins.isinstance = builtins.getattr = builtins.str = builtins.len = None
