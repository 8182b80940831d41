printf 'a\nb\n' | tee /dev/stderr
