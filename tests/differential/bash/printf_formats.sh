printf '%05d|%-5s|%x|%q|%s\n' 42 ab 255 "a b" x; printf '%s,' 1 2 3; printf '\u2713\n'
