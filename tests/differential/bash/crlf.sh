echo a
x=5
echo $x
