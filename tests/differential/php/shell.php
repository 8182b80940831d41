<?php echo shell_exec("echo hi"); passthru("exit 3", $c); echo $c, "\n";
