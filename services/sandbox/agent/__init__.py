"""Agent of the sandbox: zygotes and their job supervisors, launchers of containers, and the program's own process.

The sandbox's Python interpreter runs this package, which need not be the service's, so it imports the standard library
alone. It knows nothing of requests of callers, verdicts or expected outputs.
"""

from __future__ import annotations

import sys

MODULES_AT_START = frozenset(sys.modules)
"""Modules that the interpreter had imported before this package."""
HOME = "/box"
"""Working folder of every program."""
OWN_FOLDER = "/.perigee"
"""Folder with the init in front of the job and this package."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "BLIS_NUM_THREADS")
"""Variables by which numerical libraries learn how many threads they may start: one for each core of the host unless
told, while no program has more than one core."""
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": HOME,
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    **dict.fromkeys(THREADS, "1"),
    "PYTHONHASHSEED": "0",
}
"""Variables of every program, unless its runtime or its request sets others. With a seed the order of a set of strings,
and a verdict that hangs on it, is the same in every run."""

MASKED = ("/proc/cmdline", "/proc/sys/fs/aio-nr", "/proc/sys/kernel/random/boot_id")
"""Files of /proc that tell of the host, or by which neighbours could talk; they read as empty."""
CORE_BYTES = 1
"""Limit of core dumps: too little for one, and at 0 the kernel would start the host's handler of crashes."""


def start_code(folder: str, module: str) -> str:
    """Returns Python code that runs the main function of a module of this package, found in `folder`, then what that
    returns, if anything, and so on; it leaves no trace on the import path.
    """
    path = f"import sys; sys.path = [{folder!r}, *filter(None, sys.path)]"
    return f"{path}; from agent.{module} import main as run; del sys.path[0]\nwhile run: run = run()"
