f() { [ $1 -eq 0 ] && echo bottom || f $(($1 - 1)); }; f 200
