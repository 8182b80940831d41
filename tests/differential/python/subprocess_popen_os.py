import os
with os.popen("echo hi; exit 3") as p: print(p.read())
print(os.waitstatus_to_exitcode(os.system("exit 4")))
