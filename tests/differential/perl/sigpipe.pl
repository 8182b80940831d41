open my $p, "|-", "true" or die; sleep 0.1 for 1; select undef, undef, undef, 0.1; print $p "x" x 100000; close $p; print "alive\n";
