import tempfile, os
with tempfile.NamedTemporaryFile("w+", suffix=".x") as f:
    f.write("text"); f.seek(0); print(f.read(), os.path.exists(f.name))
