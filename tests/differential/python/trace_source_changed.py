open("main.py", "w").write("replaced\n" * 9)
1 / 0
