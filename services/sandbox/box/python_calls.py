"""The two sides of a code test as modes of a box: the submission, whose function is called, and the calling test."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any, NoReturn

from .code_tests import run_code_test
from .payload import Parcel
from .remote_function import LOADED, ChannelBrokenError, RemoteFunction
from .served_function import serve_function

REQUESTS, REPLIES = 3, 4
"""Descriptors of the pipes between the two."""
REPORT = 5
"""Descriptor of the file that tells how the test ended; only the test has it. It begins with `CALLED` as soon as the
test has called the function."""
CALLED = b" "


def serve_calls(parcel: Parcel, home: str) -> NoReturn:
    """The submission's side: answers calls until the test has ended."""
    header = parcel.header
    with os.fdopen(REQUESTS, "rb") as requests, os.fdopen(REPLIES, "wb") as replies:
        serve_function(
            parcel.blobs[0],
            header["function_name"],
            requests,
            replies,
            path=f"{home}/submission.py",
            max_reply_bytes=header["reply_bytes"],
        )
        os._exit(0)


def serve_code_test(parcel: Parcel, home: str) -> NoReturn:
    """The test's side: runs it and writes its report."""
    header = parcel.header
    with os.fdopen(REQUESTS, "wb") as requests, os.fdopen(REPLIES, "rb") as replies:
        function = RemoteFunction(requests, replies, max_reply_bytes=header["reply_bytes"])
        try:
            loaded, message = function.wait_until_loaded()
        except ChannelBrokenError as error:
            loaded, message = "broken", str(error)
        report = {"loaded": loaded, "message": message}
        if loaded == LOADED:
            setup, code = (blob.decode() for blob in parcel.blobs[:2])
            called = False

            def call(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
                nonlocal called
                if not called:
                    os.write(REPORT, CALLED)
                    called = True
                return function(arguments, keywords)

            report |= asdict(run_code_test(setup, code, header["function_name"], call))
        os.write(REPORT, json.dumps(report).encode())
        os._exit(0)
