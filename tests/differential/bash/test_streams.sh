# differential: {"stdin": "x"}
for fd in 0 1 2; do
  [ -t $fd ] && echo tty; [ -p /dev/fd/$fd ] && echo pipe; [ -f /dev/fd/$fd ] && echo file; [ -w /dev/fd/$fd ] && echo writable
done
tty
