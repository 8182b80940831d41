import subprocess, sys
subprocess.run([sys.executable, "-c", "f = open('o', 'w'); f.write('kept')"])
print(open("o").read())
