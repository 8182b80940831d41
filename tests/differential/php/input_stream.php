<?php // differential: {"stdin": "a\nb\n"}
 echo strtoupper(file_get_contents("php://stdin")), count(file("main.php")), "\n";
