print "x" if;
