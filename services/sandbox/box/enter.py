"""Enters the root of a runtime and becomes its zygote, run by that root's own Python."""

from __future__ import annotations

import json
import os
import signal
import sys

from . import kernel, root

CODE = f"import sys; sys.path.insert(0, {root.OWN_FOLDER!r}); from box.zygote import main; del sys.path[0]; main()"


def main() -> None:
    """Arguments: a JSON object with the root, the interpreter in it, and the zygote's options."""
    fields = json.loads(sys.argv[1])
    kernel.die_with_parent(signal.SIGKILL)
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
        root.enter_root(root.RootOptions(**fields.pop("root")))
        python = fields.pop("python")
        os.execv(python, [python, "-I", "-c", CODE, json.dumps(fields)])
    except OSError as error:
        sys.exit(f"sandbox zygote: {error}")
