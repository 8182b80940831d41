"""Configuration of the checkpoint engine, nested as `weights` in the configurations of trainer and rollout."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from perigee.errors import InvalidArgumentError
from services.kit.addresses import is_loopback
from services.kit.config import Model


class WeightsConfig(Model):
    """Transfer of weights from the trainer to the rollout workers."""

    transport: Literal["tcp", "rdma"] = "tcp"
    """Transport of Mooncake; "rdma" fails to start without a network card instead of falling back to TCP."""
    device: str = ""
    """RDMA devices, comma separated, "mlx5_0" for instance; empty takes every one that is there."""
    host: str | None = None
    """Name or address under which the other side reaches this process; unset takes the one that the service
    advertises."""
    min_rpc_port: int = Field(15000, ge=1024, le=65535)
    """First port that Mooncake may listen on; it listens on all interfaces without a token, so fence the range off."""
    max_rpc_port: int = Field(16999, ge=1024, le=65535)
    """Last port that Mooncake may listen on; a receiver takes two ports, a sender two for each parallel target."""
    slice_bytes: int = Field(1 << 20, ge=1 << 16)
    """Bytes of one TCP write inside Mooncake."""
    progress_timeout_s: float = Field(10.0, ge=1)
    """Seconds without a byte of progress after which Mooncake gives up a TCP write; whole seconds are used."""
    prepare_timeout_s: float = Field(60.0, gt=0)
    """Deadline of the receiver's answer to a preparation; a commit under way there is waited for within it."""
    transfer_timeout_s: float = Field(300.0, gt=0)
    """Deadline of the bytes to one receiver."""
    commit_timeout_s: float = Field(600.0, gt=0)
    """Deadline of a receiver's checksums and swap into its engine."""
    max_parallel_targets: int = Field(16, ge=1)
    """Receivers written to at once."""
    max_shard_bytes: int = Field(1 << 30, ge=1)
    """Tensors are packed into shards up to this size; one larger tensor is a shard of its own."""
    block_bytes: int = Field(1 << 20, ge=1 << 12)
    """Bytes of a piece where weights are pulled: tensors are cut into blocks of rows, and a relay passes on the first
    while it reads the next."""
    max_image_bytes: int = Field(1 << 40, ge=1)
    """Bytes of the largest image that a receiver accepts."""
    shared_memory_dir: str = "/dev/shm"
    """Folder of the images; a tmpfs with room for one image in the trainer and for three in a rollout worker."""

    def reached_at(self, advertised_host: str) -> WeightsConfig:
        """Returns these settings with a host; raises InvalidArgumentError for loopback where others are elsewhere."""
        if self.host is None:
            return self.model_copy(update={"host": advertised_host})
        if is_loopback(self.host) and not is_loopback(advertised_host):
            raise InvalidArgumentError.for_field(
                "weights.host",
                f"{self.host} cannot be reached from other machines: leave it out to take {advertised_host}",
            )
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        if self.max_rpc_port < self.min_rpc_port + 2:
            raise ValueError("max_rpc_port must be at least min_rpc_port + 2")
        return self
