puts(1
