# differential: {"stdin": "one\ntwo\nthree\n"}
read a; head -n 1; read b; echo "$a|$b"
