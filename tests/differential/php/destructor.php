<?php class A { function __destruct() { echo "gone\n"; } } $a = new A; echo "body\n";
