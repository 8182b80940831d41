trap
trap '' PIPE
(echo a; sleep 0.1; echo b; echo "status $?" >&2) | head -n 1
