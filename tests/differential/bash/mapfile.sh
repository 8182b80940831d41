# differential: {"stdin": "x\ny\n"}
mapfile -t lines; echo "${#lines[@]} ${lines[*]}"
