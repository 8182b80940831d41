print(open("/dev/null").read() == "", open("/dev/null", "w").write("gone"))
