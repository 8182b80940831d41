$| = 1; print "a\n"; open my $f, ">", "/dev/stdout" or die $!; print $f "b\n"; close $f; print "c\n";
