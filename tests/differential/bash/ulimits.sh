ulimit -s
