echo one >&2
echo two > /dev/stderr
echo three >&2
