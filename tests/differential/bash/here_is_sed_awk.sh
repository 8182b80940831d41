# differential: {"stdin": "a 1\nb 2\n"}
awk '{s += $2; print $1 > "/dev/stderr"} END {print s > "/dev/stdout"; print "end"}'
