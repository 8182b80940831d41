(exit 3); echo $?; x=$(echo out; exit 5); echo $? "$x"
