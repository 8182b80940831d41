# What a shell alone can try: the host's files, the network by bash's own redirections, signals, mounts, other users.
secret=$1
for path in "$secret" /etc/shadow /proc/1/environ "/proc/1/root$secret" "/proc/self/root$secret" /proc/kcore /dev/mem; do
  [ -n "$(head -c 1 "$path" 2>/dev/null | tr -d '\0')" ] && echo "read $path"
done
for path in / /usr /etc /dev /proc/sys/kernel; do
  (: >"$path/mine") 2>/dev/null && echo "wrote below $path"
done
(exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null && echo "network"
(exec 3<>/dev/udp/127.0.0.1/53) 2>/dev/null && echo "network"
kill -KILL 1 2>/dev/null && echo "killed the first process"
mount -t tmpfs tmpfs /tmp 2>/dev/null && echo "mounted"
unshare -r true 2>/dev/null && echo "a namespace"
[ "$(su -c 'id -u' </dev/null 2>/dev/null)" = 0 ] && echo "root"
ulimit -Hu unlimited 2>/dev/null && echo "raised a limit"
[ "$(id -u)" -lt 1000 ] && echo "runs as a user of the system"
ls /sys/fs/cgroup 2>/dev/null | grep -q . && echo "sees control groups"
echo held
