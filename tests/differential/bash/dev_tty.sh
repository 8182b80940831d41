echo x > /dev/tty
echo $?
