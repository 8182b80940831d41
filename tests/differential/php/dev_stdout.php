<?php echo "a\n"; file_put_contents("/dev/stdout", "b\n"); echo "c\n"; fwrite(STDERR, "e\n");
