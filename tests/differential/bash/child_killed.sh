{ bash -c 'kill -9 $$'; } 2> /dev/null
echo $?
