# differential: {"stdin": "b\na\n"}
import subprocess
print(subprocess.run(["sort"], capture_output=True, text=True))
