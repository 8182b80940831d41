<?php // differential: {"stdin": "3 4\n"}
 fscanf(STDIN, "%d %d", $a, $b); echo $a + $b, "\n";
