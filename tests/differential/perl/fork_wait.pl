if (my $p = fork) { waitpid $p, 0; print $? >> 8, "\n" } else { exit 3 }
