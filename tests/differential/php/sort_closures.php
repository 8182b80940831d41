<?php $a = [3, 1, 2]; usort($a, fn($x, $y) => $y <=> $x); echo implode(",", $a), array_sum(array_map(fn($x) => $x ** 2, $a)), "\n";
