# differential: {"stdin": "in"}
cat /dev/fd/0; echo; echo out > /dev/fd/1; echo err > /proc/self/fd/2
