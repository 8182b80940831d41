<?php echo $x; echo 1 / 1, [1][5] ?? "d", "\n"; echo intdiv(1, 0);
