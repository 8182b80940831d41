# differential: {"stdin": "3 4\n5\n"}
my $s = 0; while (<>) { $s += $_ for split } print "$s\n";
