<?php // differential: {"args": ["a b", "x"]}
 echo $argc, " ", $argv[1], " ", basename(__FILE__), " ", PHP_SAPI, "\n";
