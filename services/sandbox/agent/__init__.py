"""What runs at the box's side: zygotes and their boxes, launchers of containers, and the program's own process.

This package is run by the box's Python interpreter, which need not be the service's, so it imports the standard
library alone. It knows nothing of requests, verdicts or expected outputs.
"""

from __future__ import annotations

import sys

MODULES_AT_START = frozenset(sys.modules)
"""What the interpreter had imported before this package was."""
