import subprocess, sys
print("first", flush=True)
subprocess.run("echo second; echo third >&2", shell=True)
