declare -A m=([a]=1 [b]=2); a=(x "y z"); echo "${m[b]} ${#a[@]} ${a[@]: -1} ${!m[@]}" | tr ' ' '\n' | sort
