"""The limit of open files, in processes of their own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

SOURCE = """
import json, os, resource, sys
from perigee.errors import FailedPreconditionError
from services.sandbox.runtime.worker_slots import raise_open_file_limit
for soft, hard, slots, calls in json.loads(sys.argv[1]):
    if os.fork() != 0:
        os.wait()
        continue
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        raise_open_file_limit(slots, calls)
    except FailedPreconditionError as error:
        print(error.message)
    else:
        print(*resource.getrlimit(resource.RLIMIT_NOFILE))
    sys.exit()
"""
EXPECTED = {
    (256, 2000, 20, 0): "992 2000",
    (256, 2000, 20, 8): "1000 2000",
    (1000, 2000, 20, 8): "1000 2000",
    (1000, 2000, 62, 1000): "2000 2000",
    (1000, 2000, 63, 0): "sandbox.slots and max_sessions need 2024 open files, and the limit is 2000: ",
}


def test_it_is_raised_as_far_as_needed() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000:
        pytest.skip("needs a limit of 2000 open files")
    command = [sys.executable, "-u", "-c", SOURCE, json.dumps(list(EXPECTED))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    for line, (given, expected) in zip(result.stdout.splitlines(), EXPECTED.items(), strict=True):
        assert line.startswith(expected), (given, result)
