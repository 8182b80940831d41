<?php register_shutdown_function(fn() => print("bye\n")); echo "x\n"; exit(5);
