import subprocess
print(subprocess.run("yes | head -n 2", shell=True, capture_output=True, text=True))
