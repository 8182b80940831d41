# differential: {"stdin": "data"}
import subprocess, sys
print(subprocess.run([sys.executable, "-c", "print(input())"], capture_output=True, text=True).stdout)
