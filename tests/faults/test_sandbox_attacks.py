"""One hostile program per test, in every isolation: each is held, and the sandbox serves the next job as before."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import function_tests, stdio_tests

LIMITS = pb.Limits(
    wall_ms=10_000, cpu_ms=1000, memory_bytes=64 << 20, processes=16, file_bytes=1 << 20, output_bytes=65536
)


async def run(sandbox: SandboxClient, source: str, **limits: int) -> pb.ExecuteResponse:
    merged = pb.Limits()
    merged.CopyFrom(LIMITS)
    merged.MergeFrom(pb.Limits(**limits))
    return await sandbox.execute(pb.ExecuteRequest(language="python", source=source.encode(), limits=merged))


async def assert_serves(sandbox: SandboxClient) -> None:
    response = await run(sandbox, "print(open('/proc/self/status').read().count('Uid'), 6 * 7)")
    assert (response.status, response.stdout) == (pb.STATUS_OK, b"1 42\n")


async def test_fork_bomb(sandbox: SandboxClient) -> None:
    source = "import os\nmade = 0\nwhile True:\n  try:\n    os.fork(); made += 1\n  except OSError: pass\n"
    response = await run(sandbox, source, memory_bytes=256 << 20)
    assert response.status == pb.STATUS_TIME_LIMIT
    await assert_serves(sandbox)


async def test_processes_are_counted(sandbox: SandboxClient) -> None:
    source = """
import os, time
made = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(10); os._exit(0)
        made += 1
except OSError:
    pass
print(made)
"""
    response = await run(sandbox, source)
    assert response.status == pb.STATUS_OK
    assert 8 <= int(response.stdout) <= 16


async def test_memory_bomb(sandbox: SandboxClient) -> None:
    response = await run(sandbox, "held = []\nwhile True: held.append(bytearray(1 << 20))")
    assert response.status == pb.STATUS_MEMORY_LIMIT
    assert 60 << 20 <= response.peak_memory_bytes <= 96 << 20
    await assert_serves(sandbox)


async def test_memory_bomb_in_a_child_that_lowers_its_oom_score(sandbox: SandboxClient) -> None:
    source = """
import os
open('/proc/self/oom_score_adj', 'w').write('0')
pid = os.fork()
if pid == 0:
    held = []
    while True: held.append(bytearray(1 << 20))
os.waitpid(pid, 0)
print('survived')
"""
    assert (await run(sandbox, source)).status == pb.STATUS_MEMORY_LIMIT
    await assert_serves(sandbox)


async def test_memory_within_the_limit_is_given(sandbox: SandboxClient) -> None:
    response = await run(sandbox, "held = bytearray(b'x') * (40 << 20)\nprint(len(held))")
    assert (response.status, response.stdout) == (pb.STATUS_OK, b"41943040\n")
    assert 40 << 20 <= response.peak_memory_bytes <= 56 << 20


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",  # noqa: E501
        "import time\ntime.sleep(60)",
        "import threading\ndef spin():\n  while True: pass\nthreading.Thread(target=spin).start()",
        "import os\nif os.fork(): os.wait()\nwhile True: pass",
    ],
    ids=["busy", "deaf", "asleep", "thread", "child"],
)  # fmt: skip
async def test_endless_programs(sandbox: SandboxClient, source: str) -> None:
    started = time.monotonic()
    response = await run(sandbox, source, wall_ms=700, cpu_ms=500)
    assert response.status == pb.STATUS_TIME_LIMIT
    assert time.monotonic() - started < 5
    assert 400 <= response.wall_ms <= 3000


async def test_cpu_limit_counts_children(sandbox: SandboxClient) -> None:
    source = "import os\nfor _ in range(4): os.fork()\nwhile True: pass"
    response = await run(sandbox, source, wall_ms=20_000, cpu_ms=300)
    assert response.status == pb.STATUS_TIME_LIMIT
    assert response.wall_ms < 10_000


async def test_output_flood(sandbox: SandboxClient) -> None:
    for stream in ("stdout", "stderr"):
        response = await run(sandbox, f"import sys\nwhile True: sys.{stream}.write('x' * 1000)")
        assert response.status == pb.STATUS_OUTPUT_LIMIT
        assert (response.stdout_truncated, response.stderr_truncated) == (stream == "stdout", stream == "stderr")
        assert len(getattr(response, stream)) == 65536
    await assert_serves(sandbox)


@pytest.mark.parametrize("folder", ["/box", "/tmp", "/dev/shm"])
async def test_disk_fill(sandbox: SandboxClient, folder: str) -> None:
    source = f"""
written = 0
try:
    for index in range(100):
        with open(f'{folder}/{{index}}', 'wb') as file:
            written += file.write(b'x' * 100_000)
            file.flush()
except OSError as error:
    print(error.errno, written <= 1 << 20)
"""
    response = await run(sandbox, source)
    assert (response.status, response.stdout) == (pb.STATUS_OK, b"28 True\n")


async def test_inode_fill(sandbox: SandboxClient) -> None:
    source = (
        "try:\n  for i in range(10**5): open(f'/tmp/{i}', 'w').close()\nexcept OSError as e: print(e.errno, i < 1100)"
    )
    assert (await run(sandbox, source)).stdout == b"28 True\n"


async def test_nothing_of_the_host_is_there(sandbox: SandboxClient) -> None:
    source = f"""
import os
outside = '/etc/shadow /root /home /var /sys/fs/cgroup /run/perigee /proc/kcore /dev/sda /dev/vda /dev/mem'
of_init = '/proc/1/environ /proc/1/mem /proc/1/fd /proc/1/cwd/etc /proc/1/root/etc'
for path in [*outside.split(), *of_init.split(), {str(Path(__file__).parent)!r}]:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1)
        print('reached', path)
    except OSError:
        pass
for path in ('/', '/usr', '/usr/bin', '/etc', '/proc/sys/kernel', '/dev', '/run', '/proc'):
    try:
        open(path + '/mine', 'w')
        print('wrote', path)
    except OSError:
        pass
print(sorted(pid for pid in os.listdir('/proc') if pid.isdigit() and pid not in ('1', str(os.getpid()))))
"""
    response = await run(sandbox, source)
    assert (response.stdout, response.stderr) == (b"[]\n", b"")


async def test_privileges_are_gone(sandbox: SandboxClient) -> None:
    source = """
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
for key in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb'):
    assert int(status[key], 16) == 0, key
assert status['NoNewPrivs'].strip() == '1'
assert status['Seccomp'].strip() == '2'
assert min(map(int, status['Uid'].split())) >= 60001
assert min(map(int, status['Gid'].split())) >= 60001
assert status['Groups'].strip() == ''
"""
    response = await run(sandbox, source)
    assert (response.status, response.stderr) == (pb.STATUS_OK, b"")


async def test_network_and_kernel_are_out_of_reach(sandbox: SandboxClient) -> None:
    source = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, 40):
    try:
        socket.socket(family, socket.SOCK_DGRAM)
        print('socket', family)
    except OSError:
        pass
socket.socketpair()[0].close()
def call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) >= 0:
        print(name, arguments)
call('ptrace', 16, 1, 0, 0)
call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None)
call('umount2', b'/tmp', 2)
call('unshare', 0x10000000)
call('unshare', 0x00020000)
call('setns', 0, 0)
call('chroot', b'/tmp')
call('syscall', 321, 0, 0, 0)
call('syscall', 425, 8, 0)
call('syscall', 250, 0, 0, 0)
call('syscall', 435, 0, 0)
call('setuid', 0)
for pid in (1,):
    try:
        os.kill(pid, 9); print('killed', pid)
    except OSError:
        pass
try:
    os.mknod('/tmp/device', 0o060666, os.makedev(254, 0)); print('mknod')
except OSError:
    pass
os.mkfifo('/tmp/fifo')
print(os.listdir('/sys') if os.path.exists('/sys') else 'no sys', socket.gethostname())
"""
    response = await run(sandbox, source)
    assert (response.stdout, response.stderr) == (b"no sys box\n", b"")


async def test_descriptors_do_not_leak(sandbox: SandboxClient) -> None:
    source = "import os\nprint(sorted(int(fd) for fd in os.listdir('/proc/self/fd')))"
    response = await run(sandbox, source)
    assert response.stdout == b"[0, 1, 2, 3]\n"  # 3 is the listing's own


async def test_daemons_and_files_do_not_outlive_the_job(sandbox: SandboxClient) -> None:
    source = """
import os, time
open('/tmp/mine', 'w').write('x'); open('/box/mine', 'w').write('x')
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            time.sleep(0.01)
    os._exit(0)
time.sleep(0.1)
print('left')
"""
    look = "import os\nprint(os.listdir('/tmp'), sorted(os.listdir('/box')), sum(p.isdigit() for p in os.listdir('/proc')))"  # noqa: E501
    for _ in range(2 * len(os.sched_getaffinity(0))):  # every slot has had the daemon
        assert (await run(sandbox, source)).stdout == b"left\n"
    for _ in range(2 * len(os.sched_getaffinity(0))):
        assert (await run(sandbox, look)).stdout == b"[] ['main.py'] 2\n"


async def test_jobs_do_not_see_each_other(sandbox: SandboxClient) -> None:
    secret = b"sesame" * 3
    source = "import time\nkey = input()\nopen('/tmp/key', 'w').write(key)\ntime.sleep(1)\nprint(len(key))"
    request = pb.ExecuteRequest(language="python", source=source.encode(), stdin=secret, limits=LIMITS)
    holder = asyncio.create_task(sandbox.execute(request))
    await asyncio.sleep(0.3)
    look = """
import os
print(os.path.exists('/tmp/key'))
for pid in os.listdir('/proc'):
    if pid.isdigit() and int(pid) != os.getpid():
        try:
            print(b'sesame' in open(f'/proc/{pid}/cmdline', 'rb').read(), open(f'/proc/{pid}/environ', 'rb').read())
        except OSError:
            print('refused')
"""
    assert (await run(sandbox, look)).stdout.splitlines()[0] == b"False"
    assert (await holder).stdout == b"18\n"


async def test_nothing_of_a_job_stays_in_memory(sandbox: SandboxClient) -> None:
    """The marker is built at run time in the search, so that only a leftover of the first program can match."""
    source = "needle = 'zyx' + 'wvu-marker'\nprint(len(needle * 1000))\n# zyxwvu-marker"
    search = """
needle = 'zyx' + ''.join(['wvu', '-', 'marker'])
data = needle.encode()
found = 0
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb') as memory:
    for line in maps:
        span, mode = line.split()[:2]
        if 'rw' in mode and '[v' not in line:
            start, end = (int(part, 16) for part in span.split('-'))
            memory.seek(start)
            try:
                found += memory.read(end - start).count(b'# ' + data)
            except OSError:
                pass
print(found)
"""
    for _ in range(2 * len(os.sched_getaffinity(0))):
        assert (await run(sandbox, source)).stdout == b"13000\n"
    for _ in range(2 * len(os.sched_getaffinity(0))):
        response = await run(sandbox, search)
        assert (response.stdout, response.stderr) == (b"0\n", b"")


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)\ndef f(x): return 2 * x",
        "import os\ndef f(x): os._exit(0)",
        "class Any:\n  def __eq__(self, other): return True\n  def __ne__(self, other): return False\ndef f(x): return Any()",  # noqa: E501
        "class Any(int):\n  def __eq__(self, other): return True\n  __hash__ = None\ndef f(x): return Any(7)",
        "import json\njson.dumps = lambda *a, **k: 'null'\njson.loads = lambda *a, **k: [0]\ndef f(x): return 7",
        "import json\nclass E(json.JSONEncoder): pass\njson._default_encoder = E()\ndef f(x): return 7",
        "import builtins\nbuiltins.map = lambda *a: [True]\nbuiltins.all = lambda *a: True\ndef f(x): return 7",
        "import os\nfor fd in range(3, 50):\n  try: os.write(fd, b'v' * 4096)\n  except OSError: pass\ndef f(x): return 7",  # noqa: E501
        "import os, sys\ndef f(x):\n  for fd in range(3, 50):\n    try: os.write(fd, b'\\0\\0\\0\\1' + b'0' * 16 + b'v4')\n    except OSError: pass\n",  # noqa: E501
        "import sys\nfor m in list(sys.modules.values()):\n  for n in ('same_json', 'judge', '_result'):\n    if hasattr(m, n): setattr(m, n, lambda *a: True)\ndef f(x): return 7",  # noqa: E501
        "def f(x):\n  print(2 * x)\n  return 'ACCEPTED'",
        "import os\npid = os.fork()\ndef f(x): return 7 if pid else 8",
        "f = type",
    ],
)  # fmt: skip
async def test_tricks_do_not_pass_for_answers(sandbox: SandboxClient, source: str) -> None:
    tests = function_tests([([3], 6), ([5], 10)])
    response = await sandbox.judge(
        pb.JudgeRequest(language="python", source=source.encode(), function_name="f", tests=tests, limits=LIMITS)
    )
    assert response.verdict in (
        pb.TEST_VERDICT_WRONG_ANSWER,
        pb.TEST_VERDICT_RUNTIME_ERROR,
        pb.TEST_VERDICT_OUTPUT_LIMIT,
    )
    assert response.passed == 0
    await assert_serves(sandbox)


async def test_a_prefix_of_the_output_is_not_the_output(sandbox: SandboxClient) -> None:
    for source, expected in ((b"print(1)", b"1 2"), (b"print('1 2 3')", b"1 2"), (b"print(12)", b"1 2"), (b"", b"1")):
        request = pb.JudgeRequest(language="python", source=source or b"pass", tests=stdio_tests([(b"", expected)]))
        assert (await sandbox.judge(request)).verdict == pb.TEST_VERDICT_WRONG_ANSWER
