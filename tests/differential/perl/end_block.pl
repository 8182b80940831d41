END { print "end $?\n"; $? = 4 } print "body\n"; exit 2;
