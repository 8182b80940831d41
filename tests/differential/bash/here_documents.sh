cat <<A; cat <<<"b $((1 + 1))"; cat <<'C'
a $((1 + 1))
A
$c
C
