echo 5 | awk '{exit $1}'; echo $?
