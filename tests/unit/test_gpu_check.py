"""Parts of the GPU checks that run without one: settings, the choice of devices, the answer where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from perigee.errors import InvalidArgumentError
from services.rollout.config import RolloutConfig
from services.trainer import __main__ as trainer_main
from services.trainer.config import TrainerConfig
from tests.gpu.test_gpu import engine_settings, trainer_settings

ROOT = Path(__file__).parents[2]


def test_services_take_the_settings_of_the_checks(tmp_path: Path) -> None:
    for fields in ({}, {"enforce_eager": False}, {"tensor_parallel_size": 2}):
        assert RolloutConfig(**engine_settings(tmp_path, **fields)).enable_sleep_mode
    for fields in ({"data_parallel": 2}, {"router_aux_loss_coef": 0.01}, {"weights": {"transport": "rdma"}}):
        assert TrainerConfig(**trainer_settings(tmp_path, tmp_path, **fields)).dtype == "bfloat16"


def test_a_trainer_s_gpus_are_chosen_before_any_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainerConfig(model="m", run_path="r", visible_devices="1,2", network_interface="eth1")

    def refuse(*_: object, **__: object) -> str:
        raise InvalidArgumentError("no such model")

    for name in ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(trainer_main, "load_config", lambda _: config)
    monkeypatch.setattr(trainer_main, "fetch_model", refuse)
    with pytest.raises(SystemExit):
        trainer_main.main()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "eth1"
    # What was chosen elsewhere stays.
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "0"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_checked_and_the_exit_status_says_so() -> None:
    ended = subprocess.run([ROOT / "tools/gpu-check.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "nothing was checked" in ended.stderr
