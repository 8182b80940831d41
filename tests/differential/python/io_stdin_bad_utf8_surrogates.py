# differential: {"stdin_hex": "61ff620a"}
import io, sys
print(ascii(io.TextIOWrapper(sys.stdin.buffer, errors="surrogateescape").read()))
