# differential: {"stdin": "x\ny\n"}
read a
echo "$a"
cat /dev/stdin
