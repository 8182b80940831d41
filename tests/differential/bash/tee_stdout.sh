printf 'a\nb\n' | tee /dev/stdout | sort -r
