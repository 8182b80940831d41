Process.kill(:KILL, Process.pid); sleep 1
