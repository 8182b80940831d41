import subprocess
subprocess.run(["surely-not-there"])
