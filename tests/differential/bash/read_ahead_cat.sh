# differential: {"stdin": "one\ntwo\nthree\n"}
read a; python3 -c 'print(input())'; echo "$a"
