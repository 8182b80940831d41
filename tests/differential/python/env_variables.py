# differential: {"env": {"MINE": "1", "EMPTY": "", "U": "\u00fc"}}
import os
print([os.environ.get(n) for n in ("MINE", "EMPTY", "U", "NONE", "LANG", "SHLVL", "PWD")], os.getenvb(b"U"))
