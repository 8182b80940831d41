print `echo hi; exit 3`, $? >> 8, "\n"; system "kill -9 \$\$"; print $? & 127, "\n";
