# ruff: noqa: E501 -- a program a line
"""A Python program behaves the same in every isolation.

What the language does by itself is not tried again: test_sandbox_differential has it.
"""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

ADDRESS = re.compile("at 0x[0-9a-f]+")
TIME = re.compile(r"in \d+\.\d+s")


@dataclass(frozen=True)
class Example:
    """A program and what it is started with."""

    source: str
    stdin: bytes = b""
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Ending(NamedTuple):
    """What a caller sees of a run."""

    status: str
    exit_code: int
    signal: int
    stdout: str
    stderr: str


PROGRAMS = {
    "exit code": Example("import sys; sys.exit(7)"),
    "exit with a message": Example("import sys; sys.exit('went wrong')"),
    "exit of the process": Example("import os; print('lost'); os._exit(5)"),
    "traceback": Example("def f(x):\n    return 1 / x\n\n\nprint('before', flush=True)\nf(0)\n"),
    "traceback through a file": Example("import helper\nhelper.fail()", files={"helper.py": "def fail():\n  [][1]\n"}),
    "keyboard interrupt": Example("raise KeyboardInterrupt"),
    "an abort": Example("import os; os.abort()"),
    "a segmentation fault": Example("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
    "a termination": Example("import os, signal; print('a', flush=True); os.kill(os.getpid(), signal.SIGTERM)"),
    "a broken pipe": Example("import os, signal\nr, w = os.pipe(); os.close(r)\ntry:\n  os.write(w, b'x')\nexcept BrokenPipeError:\n  print('raised')"),
    "a signal that is handled": Example("import os, signal\nsignal.signal(signal.SIGTERM, lambda *a: print('got', a[0]))\nos.kill(os.getpid(), 15)\nprint('end')"),
    "signals by default": Example("import signal\nfor s in sorted(signal.valid_signals()):\n  print(s, signal.getsignal(s))"),
    "signals that are blocked": Example("import signal\nprint(signal.pthread_sigmask(signal.SIG_BLOCK, []))"),
    "arguments": Example("import sys; print(sys.argv[1:])", args=("one", "", "two words", "ü", "-x", "--", "*")),
    "names": Example("print(__name__, __doc__, __package__)"),
    "name of the file": Example("import os; print(os.path.basename(__file__), os.path.isfile(__file__))"),
    "own source": Example("print(len(open(__file__).read()))"),
    "builtins": Example("import builtins; print(__builtins__ is builtins, type(exit).__name__, callable(help))"),
    "main module": Example("import sys, __main__\nx = 5\nprint(__main__.x, sys.modules['__main__'] is __main__)"),
    "names of the module": Example("print(sorted(n for n in globals() if n not in ('__annotations__', '__cached__')))"),
    "future statements": Example("from __future__ import annotations\ndef f(x: missing): pass\nprint(f.__annotations__)"),
    "input": Example("print(input('? '), input())\nprint(input())", stdin=b"1\n2\n3"),
    "input to its end": Example("import sys; print(sys.stdin.read().split(), sys.stdin.read())", stdin=b"1\n2\n3"),
    "input in bytes": Example("import sys; print(sys.stdin.buffer.read())", stdin=bytes(range(256))),
    "input that is not text": Example("input()", stdin=b"\xff\xfe\n"),
    "no input": Example("import sys; print(repr(sys.stdin.read())); input()"),
    "input by descriptor": Example("import os; print(os.read(0, 99)); print(open(0, 'rb', closefd=False).read())", stdin=b"abc"),
    "input of a child": Example("import subprocess; print(subprocess.run(['cat'], capture_output=True).stdout)", stdin=b"abc"),
    "streams": Example("import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr): print(s.encoding, s.errors, s.line_buffering, s.isatty(), s.fileno(), s.name)"),
    "order of streams": Example("import sys\nprint('a'); sys.stderr.write('b\\n'); print('c'); sys.stdout.write('d')"),
    "unflushed output": Example("import sys; sys.stdout.write('no newline')"),
    "unflushed output and an exception": Example("import sys; sys.stdout.write('no newline'); raise ValueError"),
    "closed output": Example("import sys; print('a'); sys.stdout.close()"),
    "output that is replaced": Example("import io, sys\nsys.stdout = io.StringIO()\nprint('swallowed')\nsys.__stdout__.write('told')"),
    "output to a descriptor": Example("import os; print('second'); os.write(1, b'first\\n')"),
    "output that cannot be encoded": Example("print('\\ud800')"),
    "unicode": Example("print('äöü €  \\N{SNOWMAN}')"),
    "locale": Example("import locale, sys\nprint(locale.getpreferredencoding(False), sys.getfilesystemencoding(), sys.getdefaultencoding(), locale.getlocale())"),
    "a text stream around the output's buffer": Example("import io, sys\nout = io.TextIOWrapper(sys.stdout.buffer)\na, b = map(int, input().split())\nout.write(f'{a + b}\\n')", stdin=b"3 4"),
    "a text stream around the output's buffer that is used later": Example("import io, sys\nprint('first')\nout = io.TextIOWrapper(sys.stdout.buffer)\nout.write('second')"),
    "the output's descriptor, opened by os": Example("import os\nout = os.fdopen(1, 'w')\nout.write('x')"),
    "the output's descriptor, opened": Example("out = open(1, 'w')\nprint('x', file=out)"),
    "a buffer around the output's descriptor": Example("import io\nout = io.BufferedWriter(io.FileIO(1, 'w'))\nout.write(b'x')"),
    "a print that writes to an own stream": Example("import sys\nfrom functools import partial\no = open(sys.stdout.fileno(), 'w', 1 << 16)\nprint = partial(print, file=o)\nprint('x')"),
    "a print of all modules that writes to an own stream": Example("import builtins\nfrom functools import partial\nbuiltins.print = partial(print, file=open(1, 'w', closefd=False))\nprint('x')"),
    "an own stream in a function": Example("import io, sys\ndef main():\n  out = io.TextIOWrapper(sys.stdout.buffer)\n  out.write('x')\n  sys.exit(3)\nmain()"),
    "an own stream after an exception": Example("import io, sys\nout = io.TextIOWrapper(sys.stdout.buffer)\nout.write('x')\n1/0"),
    "an own stream beside a function": Example("out = open(1, 'w')\ndef f(): pass\nout.write('x')"),
    "an own stream in a cycle": Example("class A:\n  def __init__(self): self.out, self.me = open(1, 'w'), self\na = A(); a.out.write('x')"),
    "an own stream in a module": Example("import helper\nhelper.out.write('x')", files={"helper.py": "out = open(1, 'w', closefd=False)\n"}),
    "an own stream in a standard module": Example("import json\njson.out = open(1, 'w', closefd=False)\njson.out.write('x')"),
    "an own stream beside a thread that is not waited for": Example("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nout = open(1, 'w', closefd=False)\nout.write('x')"),
    "output that fails to be flushed": Example("import sys\nclass W:\n  def write(self, text): pass\n  def flush(self): 1/0\nsys.stdout = W()\nprint('x')\nsys.exit(3)"),
    "output that cannot be flushed": Example("import sys\nclass W:\n  def write(self, text): sys.__stdout__.write(text.upper())\nsys.stdout = W()\nprint('x')"),
    "a destructor": Example("class A:\n  def __del__(self): print('gone', helper())\ndef helper(): return 5\na = A()"),
    "a destructor in a module": Example("import helper", files={"helper.py": "class A:\n  def __del__(self): print('gone')\na = A()\n"}),
    "a file that is not closed": Example("import os\nif os.fork() == 0:\n  f = open('o', 'w'); f.write('x')\nelse:\n  os.wait(); print(open('o').read())"),
    "exit functions": Example("import atexit\natexit.register(print, 'first registered')\natexit.register(print, 'last registered')\nprint('body')"),
    "threads are waited for": Example("import threading, time\ndef f():\n  time.sleep(.1); print('thread')\nthreading.Thread(target=f).start()\nprint('main')"),
    "daemon threads are not": Example("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('main')"),
    "processes": Example("import multiprocessing as m\ndef f(x): return x * x\nif __name__ == '__main__':\n  with m.get_context('fork').Pool(2) as p: print(p.map(f, [1, 2, 3]))"),
    "spawned processes": Example("import multiprocessing as m\ndef f(x): print('child', x)\nif __name__ == '__main__':\n  p = m.get_context('spawn').Process(target=f, args=(3,)); p.start(); p.join(); print(p.exitcode)"),
    "a fork": Example("import os\nif os.fork() == 0:\n  print('child')\nelse:\n  os.wait(); print('parent')"),
    "a fork that ends first": Example("import os, time\nif os.fork() == 0:\n  raise SystemExit(3)\nos.wait(); time.sleep(.2); print('parent')"),
    "an interpreter of its own": Example("import subprocess, sys\nr = subprocess.run([sys.executable, '-c', 'import sys; print(6 * 7, sys.argv)'], capture_output=True, text=True)\nprint(r)"),
    "deep recursion": Example("def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(900))\ntry:\n  f(10**6)\nexcept RecursionError as e: print(e)"),
    "deeper recursion": Example("import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20_000))"),
    "syntax of an imported file": Example("import helper", files={"helper.py": "def f(:\n"}),
    "own files": Example("import a.b, c\nprint(a.b.x, c.y, c.__file__ == __file__.replace('main', 'c'))", files={"a/__init__.py": "", "a/b.py": "x = 1", "c.py": "y = 2"}),
    "a folder without init": Example("from a.b import x; print(x)", files={"a/b.py": "x = 1"}),
    "own module named as one of the sandbox's": Example("import box, keeper; print(box.x, keeper.x)", files={"box.py": "x = 1", "keeper.py": "x = 2"}),
    "no module of the sandbox's": Example("import sys\nprint([m for m in sys.modules if m == 'box' or m.startswith('box.')])\nimport box"),
    "own module named as a standard one": Example("import random; print(random.x)", files={"random.py": "x = 1"}),
    "own package named as a standard one": Example("import json.x; print(json.x.y)", files={"json/__init__.py": "", "json/x.py": "y = 1"}),
    "own module named as a builtin one": Example("import os, sys, itertools\nprint([hasattr(m, 'x') for m in (os, sys, itertools)])", files={"os.py": "x = 1", "sys.py": "x = 1", "itertools.py": "x = 1"}),
    "files": Example("import os\nopen('a.txt', 'w').write('x')\nos.mkdir('d'); os.rename('a.txt', 'd/b')\nprint(sorted(os.listdir('.')), open('d/b').read())", files={"given.txt": "y"}),
    "files of the temporary folder": Example("import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n  f.write('x'); f.seek(0); print(f.read(), tempfile.gettempdir())"),
    "working folder": Example("import os; print(os.getcwd(), oct(os.stat('.').st_mode), os.access('.', os.W_OK))"),
    "mask of new files": Example("import os; print(oct(os.umask(0)))"),
    "user": Example("import os; print(os.getuid() == os.geteuid() == os.getgid() > 0, os.getgroups())"),
    "environment": Example("import os; print(sorted(os.environ.items()))", env={"MINE": "1", "HOME": "/elsewhere"}),
    "environment of a child": Example("import subprocess; print(subprocess.run('env | sort | grep -v ^_=', shell=True, capture_output=True, text=True).stdout)", env={"MINE": "1"}),
    "flags": Example("import sys; print(sys.flags.optimize, sys.flags.dev_mode, sys.flags.bytes_warning, sys.flags.inspect, sys.flags.interactive, sys.flags.utf8_mode, sys.flags.hash_randomization)"),
    "warnings": Example("import warnings\nwarnings.warn('careful')\nwarnings.warn('old', DeprecationWarning)\nprint('end')"),
    "open descriptors": Example("import os; print(sorted(int(f) for f in os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')))"),
    "limits": Example("import resource as r\nprint([r.getrlimit(x) for x in (r.RLIMIT_NOFILE, r.RLIMIT_CORE, r.RLIMIT_FSIZE, r.RLIMIT_NPROC, r.RLIMIT_STACK)])"),
    "randomness": Example("import random, uuid, os, secrets; print(len({random.random() for _ in range(9)}), len(os.urandom(4)))\nrandom.seed(1); print(random.random())"),
    "numpy": Example("import numpy as np; print(np.arange(6).reshape(2, 3) @ np.ones(3))"),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def warm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SandboxClient]:
    """A sandbox with warm interpreters."""
    skip_unless_possible("zygote")
    async with running_sandbox(tmp_path_factory.mktemp("zygote"), isolation="zygote", slots=1) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cold(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SandboxClient]:
    """A sandbox with nothing but containers."""
    skip_unless_possible("crun")
    async with running_sandbox(tmp_path_factory.mktemp("crun"), isolation="crun", slots=1) as client:
        yield client


def read_ending(response: pb.ExecuteResponse) -> Ending:
    stdout, stderr = (text.decode(errors="backslashreplace") for text in (response.stdout, response.stderr))
    status = pb.Status.Name(response.status)
    return Ending(status, response.exit_code, response.signal, stdout, TIME.sub("in 0s", ADDRESS.sub("at 0x0", stderr)))


async def run_python(client: SandboxClient, example: Example) -> Ending:
    """The program in a sandbox."""
    request = make_request(example, "python", example.source, example.files)
    return read_ending(await client.execute(request))


def make_request(example: Example, language: str, source: str, files: dict[str, str]) -> pb.ExecuteRequest:
    return pb.ExecuteRequest(
        language=language,
        source=source.encode(),
        stdin=example.stdin,
        args=example.args,
        env=example.env,
        files=[pb.File(path=path, content=text.encode()) for path, text in files.items()],
        limits=pb.Limits(memory_bytes=512 << 20),
    )


@pytest.mark.parametrize("name", PROGRAMS)
async def test_warm_interpreters_and_containers_agree(warm: SandboxClient, cold: SandboxClient, name: str) -> None:
    example = PROGRAMS[name]
    assert await run_python(warm, example) == await run_python(cold, example)


@pytest.mark.parametrize("isolation", ["zygote", "crun"])
async def test_signals_that_the_service_ignores_end_programs(isolation: str, tmp_path: Path) -> None:
    """A service that was started by nohup ignores SIGHUP, and so would all that it starts."""
    skip_unless_possible(isolation)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with running_sandbox(tmp_path, isolation=isolation, slots=1) as client:
            response = await client.run("import os, signal; os.kill(os.getpid(), signal.SIGHUP)")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (response.status, response.signal) == (pb.STATUS_RUNTIME_ERROR, signal.SIGHUP), response
