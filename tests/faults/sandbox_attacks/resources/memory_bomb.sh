# Doubles a variable for ever.
held=x
while true; do held=$held$held; done
