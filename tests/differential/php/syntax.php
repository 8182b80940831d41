<?php echo 1
