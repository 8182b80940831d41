$| = 1; print "a\n"; warn "b"; print "c\n";
