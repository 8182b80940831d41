<?php var_dump([1, "a" => null, 2.5, true, PHP_INT_MAX + 1, 0.1 + 0.2, "é"]); print_r([[1]]); printf("%05.1f %s\n", 3.14159, json_encode(["ü" => 1]));
