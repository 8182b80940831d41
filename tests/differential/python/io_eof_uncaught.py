# differential: {"stdin": "1\n"}
input()
input()
