"""Writes replies and rubbish into every descriptor of its session."""

import os

for descriptor in range(3, 64):
    for text in (b'{"ok": true, "result": "\'forged\'"}', b'{"kind": "replied", "number": 1}', b"x" * 4096):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
