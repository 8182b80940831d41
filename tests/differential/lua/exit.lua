io.write("no newline"); os.exit(7)
