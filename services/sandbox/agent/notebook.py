"""Cells as IPython runs them, with magics, shell commands and top-level await; what they display, and their tracebacks,
go into the reply.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .submission import describe_exception


def make_kernel(module: types.ModuleType) -> Callable[[str, int], dict[str, Any]]:
    """Returns a function that runs cells in IPython's shell, whose namespace is the module's."""
    config = importlib.import_module("traitlets.config").Config()
    config.HistoryManager.enabled = False  # no history file, nor the thread that writes it
    shell = importlib.import_module("IPython.core.interactiveshell").InteractiveShell.instance(
        config=config, user_module=module
    )
    # a shell command writes to the same descriptors
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        for descriptor in (1, 2)
    )
    displays: list[dict[str, Any]] = []
    traceback: list[str] = []

    def publish(data: Mapping[str, Any], *_: object, **__: object) -> None:
        displays.append(_display(data, is_result=False))

    def write_result(data: Mapping[str, Any], *_: object) -> None:
        displays.append(_display(data, is_result=True))

    def keep_traceback(_: object, __: object, lines: list[str]) -> None:
        traceback[:] = lines

    shell.display_pub.publish = publish
    shell.displayhook.write_output_prompt = _ignore
    shell.displayhook.write_format_data = write_result
    shell._showtraceback = keep_traceback
    shell.system = shell.system_raw  # the other one needs a terminal
    shell.enable_gui = _ignore
    shell.ask_exit = _exit

    def run_cell(text: str, _: int) -> dict[str, Any]:
        displays.clear()
        traceback.clear()
        try:
            outcome = shell.run_cell(text, store_history=True)
            error = outcome.error_before_exec or outcome.error_in_exec
        except BaseException as raised:  # an interrupt of what surrounds the cell
            error = raised
        reply: dict[str, Any] = {"ok": error is None, "displays": displays}
        for display in displays:
            if display["is_result"]:
                reply["result"] = next((text for name, text, _ in display["contents"] if name == "text/plain"), None)
        if error is not None:
            reply |= {"error_name": type(error).__name__, "error_value": _describe(error)}
            reply["traceback"] = "\n".join(traceback)
        return reply

    return run_cell


def _display(data: Mapping[str, Any], is_result: bool) -> dict[str, Any]:
    return {"is_result": is_result, "contents": [_content(name, value) for name, value in data.items()]}


def _content(mime_type: str, value: Any) -> tuple[str, str, bool]:
    """Returns type, text, and whether the text is base64."""
    if isinstance(value, bytes):
        return mime_type, base64.b64encode(value).decode(), True
    if isinstance(value, str) and not mime_type.endswith("json"):
        return mime_type, value, is_binary(mime_type)
    return mime_type, json.dumps(value, default=repr), False


def is_binary(mime_type: str) -> bool:
    """Returns whether Jupyter writes data of this type as base64."""
    return mime_type.startswith(("image/", "audio/", "video/", "application/pdf")) and mime_type != "image/svg+xml"


def _describe(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return describe_exception(error)


def _ignore(*_: object) -> None:
    pass


def _exit() -> NoReturn:
    raise SystemExit
