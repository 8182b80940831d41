my %c; $c{$_}++ for split //, "abracadabra"; print join(",", map { "$_$c{$_}" } sort keys %c), "\n"; ($_ = "a1b22") =~ s/(\d+)/$1 * 2/ge; print "$_\n";
