"""Receivers that die, freeze or never existed in the middle of a push, and senders that vanish."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import torch

from services.weights.config import WeightsConfig
from services.weights.manifest import WeightImage
from services.weights.send import WeightSender
from services.weights.shared_memory import PREFIX, SharedBuffer, remove_leftovers
from services.weights.transport import MooncakeTransport
from tests.fixtures.weights import ReceiverProcess, digest, equal, local_receiver, make_tensors, push_target

CONFIG = WeightsConfig(transfer_timeout_s=20, progress_timeout_s=4, prepare_timeout_s=20)
Export = Callable[..., WeightImage]
StartReceiver = Callable[..., Awaitable[ReceiverProcess]]


# A victim listens in a port range of its own, by which a write to it is told from the others.
VICTIM_PORTS = {"min_rpc_port": 19100, "max_rpc_port": 19199}


class SignallingTransport(MooncakeTransport):
    """Mooncake, except that something happens to the victim right before or after a write to it is submitted."""

    def __init__(
        self, config: WeightsConfig, act: Callable[[], None] = lambda: None, before: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._act = act
        self._before = before

    def submit_write(self, session: str, source: int, target: int, size: int) -> int:
        port = int(session.rpartition(":")[2])
        is_victim = VICTIM_PORTS["min_rpc_port"] <= port <= VICTIM_PORTS["max_rpc_port"]
        if is_victim:
            self._before()
        write = super().submit_write(session, source, target, size)
        if is_victim:
            self._act()
        return write


async def test_a_receiver_killed_mid_transfer_harms_no_other(export: Export, start_receiver: StartReceiver) -> None:
    tensors = {"w": torch.arange(32 << 20, dtype=torch.int32)}
    image = export(tensors, 1)
    victim = await start_receiver(**VICTIM_PORTS)
    sender = WeightSender(CONFIG, open_transport=lambda: SignallingTransport(CONFIG, victim.process.kill))
    async with local_receiver(CONFIG) as left, local_receiver(CONFIG) as right:
        targets = [
            push_target("left", left.address),
            push_target("victim", victim.address),
            push_target("right", right.address),
        ]
        outcomes = await sender.push(image, targets)
        assert [o.committed for o in outcomes] == [True, False, True]
        assert "broke off" in outcomes[1].reason
        assert equal(left.loaded, tensors)
        assert equal(right.loaded, tensors)
    await sender.close()


async def test_a_frozen_receiver_harms_no_other_and_takes_the_next_push(
    export: Export, start_receiver: StartReceiver
) -> None:
    image = export({"w": torch.arange(32 << 20, dtype=torch.int32)}, 1)
    victim = await start_receiver(**VICTIM_PORTS)
    freeze = [lambda: victim.send_signal(signal.SIGSTOP)]
    sender = WeightSender(
        CONFIG, open_transport=lambda: SignallingTransport(CONFIG, lambda: freeze.pop()() if freeze else None)
    )
    async with local_receiver(CONFIG) as other:
        targets = [
            push_target("victim", victim.address),
            push_target("other", other.address),
        ]
        outcomes = await sender.push(image, targets)
        assert [o.committed for o in outcomes] == [False, True]
        # The source is closed while a write from it may still be in flight: nothing may crash.
        image.close()
        victim.send_signal(signal.SIGCONT)
        tensors = make_tensors(seed=2, megabytes=2)
        outcomes = await sender.push(export(tensors, 2), targets)
        assert [(o.committed, o.reason) for o in outcomes] == [(True, ""), (True, "")]
        assert (await victim.next_commit())["digests"] == digest(tensors)
    await sender.close()


async def test_a_receiver_that_freezes_before_the_handshake_blocks_nobody_and_its_late_write_hits_nothing(
    export: Export, start_receiver: StartReceiver
) -> None:
    config = WeightsConfig(transfer_timeout_s=8, progress_timeout_s=4, prepare_timeout_s=20)
    late, image = make_tensors(seed=1, megabytes=2), make_tensors(seed=2, megabytes=2)
    victim = await start_receiver(**VICTIM_PORTS)

    def stop_victim() -> None:
        victim.send_signal(signal.SIGSTOP)
        while psutil.Process(victim.process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)

    freeze = [stop_victim]
    sender = WeightSender(
        config, open_transport=lambda: SignallingTransport(config, before=lambda: freeze.pop()() if freeze else None)
    )
    async with local_receiver(config) as other:
        targets = [
            push_target("victim", victim.address),
            push_target("other", other.address),
        ]
        outcomes = await sender.push(export(late, 1), targets)
        assert [o.committed for o in outcomes] == [False, True]
        assert "transfer_timeout_s = 8" in outcomes[0].reason
        # The blocked write goes on as soon as its receiver does, into a buffer that the next push must not use.
        victim.send_signal(signal.SIGCONT)
        outcomes = await sender.push(export(image, 2), targets)
        assert [(o.committed, o.reason) for o in outcomes] == [(True, ""), (True, "")]
        assert (await victim.next_commit())["digests"] == digest(image)
        assert equal(other.loaded, image)
    await sender.close()


async def test_unreachable_receivers_are_told_apart_at_once(export: Export) -> None:
    with socket.socket() as refused:
        refused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{refused.getsockname()[1]}"
        sender = WeightSender(CONFIG)
        async with local_receiver(CONFIG) as other:
            begin = time.monotonic()
            outcomes = await sender.push(
                export(make_tensors(1, 1), 1),
                [push_target("gone", address), push_target("w", other.address)],
            )
            assert time.monotonic() - begin < CONFIG.prepare_timeout_s + 3
            assert [o.committed for o in outcomes] == [False, True]
            assert address in outcomes[0].reason
        await sender.close()


async def test_a_receiver_that_accepts_and_stays_silent_is_given_up(export: Export) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        sender = WeightSender(WeightsConfig(prepare_timeout_s=5))
        async with local_receiver(CONFIG) as other:
            outcomes = await sender.push(
                export(make_tensors(1, 1), 1),
                [push_target("silent", address), push_target("w", other.address)],
            )
            assert [o.committed for o in outcomes] == [False, True]
        await sender.close()


async def test_a_restarted_receiver_at_the_same_ports_takes_the_next_push(
    export: Export, start_receiver: StartReceiver
) -> None:
    # Few ports, so that a session may come back; those of a killed process stay taken for a minute.
    ports = {"min_rpc_port": 19200, "max_rpc_port": 19219}
    sender = WeightSender(CONFIG)
    for version in range(2):
        tensors = make_tensors(seed=version, megabytes=1)
        receiver = await start_receiver(**ports)
        [outcome] = await sender.push(export(tensors, version), [push_target("w", receiver.address)])
        assert outcome.committed, outcome.reason
        assert (await receiver.next_commit())["digests"] == digest(tensors)
        receiver.process.kill()
        await receiver.process.wait()
    await sender.close()


async def test_a_stopped_receiver_leaves_no_file(export: Export, start_receiver: StartReceiver) -> None:
    receiver = await start_receiver()
    sender = WeightSender(CONFIG)
    [outcome] = await sender.push(export(make_tensors(1, 1), 1), [push_target("w", receiver.address)])
    assert outcome.committed
    assert files_of(receiver.process.pid)
    receiver.process.terminate()
    assert await asyncio.wait_for(receiver.process.wait(), 20) == 0
    assert not files_of(receiver.process.pid)
    await sender.close()


def test_leftovers_of_killed_processes_are_removed_and_files_in_use_are_not(tmp_path: Path) -> None:
    script = (
        "import os, sys, signal; from services.weights.shared_memory import SharedBuffer; "
        "buffer = SharedBuffer.allocate(sys.argv[1], 4096); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    in_use = SharedBuffer.allocate(str(tmp_path), 4096)
    [leftover] = [path for path in tmp_path.iterdir() if path != in_use.path]
    assert remove_leftovers(str(tmp_path)) == [leftover]
    assert list(tmp_path.iterdir()) == [in_use.path]
    in_use.close()
    assert list(tmp_path.iterdir()) == []


def files_of(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"{PREFIX}{pid}-*"))
