# Waits for ever, deaf, with a deaf child.
trap '' HUP INT QUIT TERM XCPU ALRM USR1 USR2
(while true; do sleep 1000; done) &
while true; do wait; done
