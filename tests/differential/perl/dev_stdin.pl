# differential: {"stdin": "x\ny\n"}
open my $f, "<", "/dev/stdin" or die $!; print scalar(reverse <$f>), "\n";
