echo one; exec > file; echo two; exec > /dev/stderr; echo three; cat file
