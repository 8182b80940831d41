{ echo out; echo err >&2; } 2>&1 | cat; echo hidden 2>&1 >/dev/null; exec 3>f; echo three >&3; cat f; echo x >| f; cat < f
