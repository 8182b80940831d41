import os, pathlib, shutil
p = pathlib.Path("d/e"); p.mkdir(parents=True)
(p / "f.txt").write_text("one\ntwo\n")
with open("d/e/f.txt", "r+") as f:
    f.readline(); f.seek(f.tell()); f.write("TWO"); f.truncate()
os.rename("d/e/f.txt", "g"); os.symlink("g", "l"); os.link("g", "h")
print(open("l").read(), [(a, sorted(b), sorted(c)) for a, b, c in sorted(os.walk("."))], os.stat("g").st_nlink, list(pathlib.Path().glob("**/*")) != [])
shutil.rmtree("d"); print(sorted(os.listdir()))
open("missing")
