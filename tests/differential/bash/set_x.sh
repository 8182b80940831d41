set -x
a=5
echo $((a + 1))
