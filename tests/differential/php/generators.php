<?php function g() { try { yield 1; yield 2; } finally { echo "end\n"; } } foreach (g() as $x) { echo $x, "\n"; break; }
