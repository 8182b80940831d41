sub f { die { code => 3 } } eval { f() }; print $@->{code}, "\n"; $x = undef; die "here";
