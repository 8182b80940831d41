"""The whole stack on eleven machines with addresses of their own, mutual TLS and tokens, and nothing on loopback.

One run goes on while workers come and go, a machine is cut off and comes back, and every service is replaced.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import PerigeeError
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2
from perigee.rpc import ChannelOptions
from services.buffer import __main__ as buffer_main
from services.coordinator import __main__ as coordinator_main
from services.reward import __main__ as reward_main
from services.sandbox import __main__ as sandbox_main
from services.trainer import __main__ as trainer_main
from tests.fixtures import steady_engine
from tests.fixtures.hosts import Network

ROOT = Path(__file__).parents[2]
PORTS = {"coordinator": 50051, "buffer": 50052, "rollout": 50053, "trainer": 50054, "reward": 50055, "sandbox": 50056}
TRAINERS, WORKERS = ("trainer-0", "trainer-1"), ("rollout-0", "rollout-1", "rollout-2")
HOSTS = ("buffer", "sandbox", "sandbox-1", "reward", *TRAINERS, "coordinator", *WORKERS, "client")
MAINS: dict[str, Callable[[], None]] = {
    "buffer": buffer_main.main,
    "sandbox": sandbox_main.main,
    "reward": reward_main.main,
    "trainer": trainer_main.main,
    "coordinator": coordinator_main.main,
    "rollout": steady_engine.main,
}
pytestmark = pytest.mark.timeout(900)
# A run that ends when the test asks for it.
ITERATIONS = 1000
WAIT_S = 300.0
TOKEN, OTHER_TOKEN = "of-the-stack", "of-another-team"


@dataclass
class Cluster:
    """The network, the prepared recipe and the certificates."""

    network: Network
    folder: Path

    @property
    def runs(self) -> Path:
        """Where run folders are made."""
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return (self.runs / "latest").resolve()

    def start(self, host: str, main: Callable[[], object] | None = None, *overrides: str, **environment: str) -> None:
        """Starts the service that a host is named for, with the host's certificate."""
        service = host.partition("-")[0]
        server = f"PERIGEE_{service.upper()}__SERVER__TLS"
        files = {
            f"{server}_CERT_FILE": f"{host}.pem",
            f"{server}_KEY_FILE": f"{host}.key",
            f"{server}_CA_FILE": "ca.pem",
        }
        paths = {name: str(self.folder / "pki" / file) for name, file in files.items()}
        arguments = ["--config", str(self.folder / "prepared/recipe.yaml")]
        for override in overrides:
            arguments += ["--set", override]
        environment |= {"PERIGEE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        self.network.start(host, main or MAINS[service], arguments, environment | paths)

    def start_trainer(self) -> None:
        """Starts both trainer processes as an outer launcher does, one on each machine."""
        for rank, host in enumerate(TRAINERS):
            meeting = {"MASTER_ADDR": TRAINERS[0], "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            self.start(host, None, "network_interface=eth0", RANK=str(rank), LOCAL_RANK="0", **meeting)

    def replace(self, host: str) -> None:
        """Stops a service in good order and starts it anew, then waits until the run has gone on."""
        self.network.stop(host)
        self.start(host)
        self.wait_for_iterations(2)

    def lines(self) -> list[dict[str, Any]]:
        """The iterations recorded so far."""
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_iterations(self, count: int, matches: Callable[[dict[str, Any]], bool] = lambda line: True) -> None:
        """Waits for iterations after the present ones that are as wanted."""
        first = len(self.lines())
        self.wait(lambda: sum(matches(line) for line in self.lines()[first:]) >= count)

    def wait(self, condition: Callable[[], object]) -> None:
        """Waits for a condition; fails with the logs of the run when it does not come."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            client = self.network.processes.get("client")
            if time.monotonic() > deadline or (client is not None and client.exitcode is not None):
                logs = {host: self.network.read_log(host)[-1500:] for host in ("client", "coordinator", *TRAINERS)}
                pytest.fail("\n".join(f"=== {host}\n{log}" for host, log in logs.items()))
            time.sleep(0.05)

    def ask(self, main: Callable[[], object], **environment: str) -> Any:
        """The answer of a process on another machine than the services."""
        answer = self.folder / "answer.json"
        name, network = "client", self.network
        running = network.processes.pop(name, None)
        network.start(name, main, [str(answer), str(self.folder / "pki")], environment)
        assert network.wait(name) == 0, network.read_log(name)[-3000:]
        network.processes.pop(name)
        if running is not None:
            network.processes[name] = running
        return json.loads(answer.read_text())


def make_certificates(network: Network, folder: Path) -> None:
    """A certificate for name, service and address of each host; an expired one, and one of another authority."""
    folder.mkdir()
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    commands = [f"req -x509 {curve} -keyout {ca}.key -out {ca}.pem -subj /CN={ca} -days 1" for ca in ("ca", "other")]
    commands.append(f"req {curve} -keyout any.key -out any.csr -subj /CN=host")
    for host in network.names:
        names = f"DNS:{host},DNS:{host.partition('-')[0]},IP:{network.address(host)}"
        (folder / f"{host}.ext").write_text(f"subjectAltName={names}\n")
        (folder / f"{host}.key").symlink_to("any.key")
        commands.append(sign(host, host, "ca", 1))
    commands += [sign("expired", "client", "ca", -1), sign("foreign", "client", "other", 1)]
    for command in commands:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


def sign(name: str, host: str, authority: str, days: int) -> str:
    """The command that makes a certificate for a host."""
    signed = f"-CA {authority}.pem -CAkey {authority}.key -CAcreateserial"
    return f"x509 -req -in any.csr {signed} -out {name}.pem -days {days} -extfile {host}.ext"


def write_recipe(folder: Path) -> Path:
    """The arithmetic recipe on eleven machines: small, and without an evaluation in between."""
    values = yaml.safe_load((ROOT / "examples/arithmetic/recipe.yaml").read_text())
    values["prepare"] = str(ROOT / "examples/arithmetic/prepare.py")
    values["run"] |= {"iterations": ITERATIONS, "sft": [], "max_live_groups": 8, "group_size": 4}
    values["run"] |= {"drop_uniform_groups": False, "curriculum": {"kind": "all"}}
    values["run"]["evaluation"] = {"every": 0, "samples": 1}
    addresses = {f"{name}_address": f"{name}:{port}" for name, port in PORTS.items()}
    addresses["trainer_address"] = f"trainer-0:{PORTS['trainer']}"
    peers = {
        "reward": ("sandbox",),
        "trainer": ("buffer",),
        "coordinator": ("buffer", "trainer", "reward"),
        "rollout": ("buffer", "coordinator"),
    }
    for service, port in PORTS.items():
        section = values.setdefault(service, {})
        section["server"] = {"host": "0.0.0.0", "port": port, "max_connection_age_seconds": 2.0, "drain_seconds": 5.0}
        section |= {f"{peer}_address": addresses[f"{peer}_address"] for peer in peers.get(service, ())}
    values["sandbox"]["server"]["audit"] = "all"
    values["sandbox"] |= {"slots": 1, "max_sessions": 0, "state_path": str(folder / "sandbox")}
    values["coordinator"] |= {"lease_seconds": 2.0, "weights": {"retry_s": 0.2}}
    values["trainer"] |= {"data_parallel": 2, "threads": 1}
    # A worker that is cut off during a push is given up soon.
    values["trainer"]["weights"] = {"prepare_timeout_s": 2.0, "transfer_timeout_s": 4.0, "progress_timeout_s": 1.0}
    values["rollout"] |= {"max_num_seqs": 8}
    values["reward"]["server"]["callers"] = {"team": {"tokens": [OTHER_TOKEN], "audiences": ["reward"]}}
    values["buffer"]["server"]["callers"] = {"team": {"tokens": [OTHER_TOKEN], "audiences": ["reward"]}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_perigee() -> None:
    """The command line."""
    from perigee.cli.main import app

    app(prog_name="perigee")


def report_refusals() -> None:
    """Writes what each wrong client hears."""
    answer, pki = Path(sys.argv[1]), Path(sys.argv[2])
    answer.write_text(json.dumps(asyncio.run(try_wrong_clients(pki))))


async def try_wrong_clients(pki: Path) -> dict[str, str]:
    """What the buffer says to clients with a wrong certificate or token, and the reward service to another team."""

    def shows(certificate: str, token: str | None = TOKEN) -> ChannelOptions:
        files = {"cert_file": str(pki / f"{certificate}.pem"), "key_file": str(pki / "any.key")}
        return ChannelOptions(token=token, ca_file=str(pki / "ca.pem"), **files)

    clients = {
        "clear": ChannelOptions(token=TOKEN),
        "no certificate": ChannelOptions(token=TOKEN, ca_file=str(pki / "ca.pem")),
        "expired": shows("expired"),
        "foreign": shows("foreign"),
        "no token": shows("client", None),
        "other audience": shows("client", OTHER_TOKEN),
        "right": shows("client"),
    }
    answers = dict(zip(clients, await asyncio.gather(*map(ask_buffer, clients.values())), strict=True))
    async with RewardClient(f"reward:{PORTS['reward']}", shows("client", OTHER_TOKEN)) as reward:
        answers["reward"] = str([each async for each in reward.score(reward_pb2.ScoreRequest())])
    return answers


async def ask_buffer(options: ChannelOptions) -> str:
    """The error of a call to the buffer."""
    async with BufferClient(f"buffer:{PORTS['buffer']}", options) as buffer:
        with pytest.raises(PerigeeError) as caught:
            await buffer.get_run(buffer_pb2.GetRunRequest(run_id="none"))
    return caught.value.message


def count_groups() -> None:
    """Writes how many groups were issued, and how many of them are in flight."""
    answer, run_id = Path(sys.argv[1]), os.environ["RUN_ID"]

    async def ask() -> tuple[int, int]:
        options = ChannelOptions.from_environment()
        async with BufferClient(f"buffer:{PORTS['buffer']}", options) as buffer:
            state = (await buffer.get_run(buffer_pb2.GetRunRequest(run_id=run_id))).run
            pages = buffer.list_groups(buffer_pb2.ListGroupsRequest(run_id=run_id))
            live = [int(group.group_id.removeprefix("g")) async for page in pages for group in page.groups]
        committed: int = json.loads(state.coordinator_state)["next_group"]
        return max([committed, *(number + 1 for number in live)]), len(live)

    answer.write_text(json.dumps(asyncio.run(ask())))


@pytest.fixture(scope="module")
def cluster(make_network: Callable[..., Network], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Services that were started in the wrong order, and a run that they train."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl: makes the certificates of the TLS tests")
    network, folder = make_network(*HOSTS), tmp_path_factory.mktemp("cluster")
    cluster = Cluster(network, folder)
    make_certificates(network, folder / "pki")
    network.start("client", run_perigee, ["prepare", str(write_recipe(folder)), "--out", str(folder / "prepared")])
    assert network.wait("client") == 0, network.read_log("client")
    del network.processes["client"]
    heldout = folder / "prepared/data/heldout.jsonl"
    heldout.write_text("".join(heldout.read_text().splitlines(keepends=True)[:4]))
    for rank, host in enumerate(TRAINERS):
        nodes = ("nodes=2", f"node_rank={rank}", "master_address=trainer-0", "network_interface=eth0")
        cluster.start(host, None, *nodes)
    for host in ("rollout-0", "coordinator", "reward", "sandbox", "buffer"):
        cluster.start(host)
    cluster.wait(lambda: '"listening"' in network.read_log("coordinator"))
    arguments = ["train", str(folder / "prepared/recipe.yaml"), "--coordinator", f"coordinator:{PORTS['coordinator']}"]
    network.start("client", run_perigee, [*arguments, "--runs-dir", str(cluster.runs), "--plain"], client(cluster))
    cluster.wait(lambda: len(cluster.lines()) >= 3)
    yield cluster
    network.close()


def client(cluster: Cluster) -> dict[str, str]:
    """Variables by which a command speaks to the services."""
    pki = cluster.folder / "pki"
    files = {"CA": "ca.pem", "CERT": "client.pem", "KEY": "client.key"}
    return {"PERIGEE_TOKEN": TOKEN} | {f"PERIGEE_{name}_FILE": str(pki / file) for name, file in files.items()}


def workers(count: int) -> Callable[[dict[str, Any]], bool]:
    """Whether an iteration ended with so many workers."""
    return lambda line: line["rollout/workers"] == count


def test_a_run_survives_scaling_a_partition_and_the_replacement_of_every_service(cluster: Cluster) -> None:
    network = cluster.network
    for host in ("rollout-1", "rollout-2", "sandbox-1"):
        cluster.start(host)
    network.rename("sandbox-1", "sandbox")
    cluster.wait_for_iterations(1, workers(3))

    network.connect("rollout-1", up=False)
    cluster.wait_for_iterations(1, workers(2))
    network.connect("rollout-1", up=True)
    cluster.wait_for_iterations(1, workers(3))

    for host in ("rollout-0", "rollout-2"):
        network.processes[host].terminate()
    assert [network.wait(host) for host in ("rollout-0", "rollout-2")] == [0, 0]
    cluster.wait_for_iterations(1, workers(1))

    for host in ("reward", "sandbox", "buffer", "coordinator", "rollout-1"):
        cluster.replace(host)
    # A machine that is lost takes the other with it, and whoever started them starts them again.
    network.processes["trainer-1"].kill()
    assert network.wait("trainer-0") == 1
    assert f"machine {network.address('trainer-1')} of the trainer is gone" in network.read_log("trainer-0")
    network.wait("trainer-1")
    cluster.start_trainer()
    cluster.wait_for_iterations(2)

    # The reward service has found the second sandbox, which was not there when it started.
    cluster.wait(lambda: '"method"' in network.read_log("sandbox-1"))

    network.processes["client"].terminate()
    assert network.wait("client") == 128 + 15
    for host in TRAINERS:
        network.processes[host].terminate()
    assert [network.wait(host) for host in TRAINERS] == [0, 0]
    lines = cluster.lines()
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    trained = sum(line["train/groups"] for line in lines)
    dropped = sum(line["train/groups_uniform"] + line["train/groups_failed"] for line in lines)
    issued, live = cluster.ask(count_groups, RUN_ID=cluster.run.name, **client(cluster))
    print(f"{issued} groups issued, {trained} trained, {dropped} dropped, {live} in flight")
    assert issued == trained + dropped + live
    assert sum(line["train/trajectories"] for line in lines) == 4 * trained > 0


def test_wrong_clients_are_refused_with_one_sentence(cluster: Cluster) -> None:
    answers = cluster.ask(report_refusals)
    assert "speaks TLS: name the roots" in answers["clear"]
    assert "wants a client certificate" in answers["no certificate"]
    assert "it has expired" in answers["expired"]
    assert "have not signed it" in answers["foreign"]
    assert "token" in answers["no token"]
    assert "The token of team is for reward" in answers["other audience"]
    assert answers["reward"] == "[]"
    assert "none" in answers["right"]  # it has no such run
