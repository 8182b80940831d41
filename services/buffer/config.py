"""Configuration of the buffer service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr

from services.kit.config import Model, ServiceConfig


class LocalServerConfig(Model):
    """Valkey server that the buffer starts when no `redis_url` is given."""

    fsync: Literal["always", "everysec"] = "always"
    """`always` syncs the append-only file before a write is answered; `everysec` waits where it must."""
    max_memory_mb: int = Field(0, ge=0)
    """Memory that the server may use, in MiB; 0 sets no limit. A full server refuses writes and drops nothing."""
    start_timeout_s: float = Field(60.0, gt=0)
    """Seconds until the server must answer, the reading of its append-only file included."""
    stop_timeout_s: float = Field(30.0, gt=0)
    """Seconds that the server has to end after it was asked to; then it is killed."""


class LimitsConfig(Model):
    """Bounds of one request."""

    chunks: int = Field(8192, ge=1)
    """Chunks of one AppendChunks call."""
    groups: int = Field(4096, ge=1)
    """Groups of one CreateGroups call."""
    trajectories: int = Field(16384, ge=1)
    """Trajectories that one call may name."""
    images: int = Field(4096, ge=1)
    """Images, or pieces of them, that one call may name."""
    trajectory_tokens: int = Field(1 << 20, ge=1)
    """Response tokens of one trajectory."""


class ImagesConfig(Model):
    """Images of a run's prompts."""

    max_bytes: int = Field(4 << 30, ge=1)
    """Bytes that the images of one run may take in Redis; a call that would pass them fails as RESOURCE_EXHAUSTED."""
    max_image_bytes: int = Field(64 << 20, ge=1)
    """Bytes of one image's file."""
    unreferenced_s: int = Field(600, ge=1)
    """Seconds after it was put for which an image is kept that no group names."""


class OffloadConfig(Model):
    """Files in which tokens of long trajectories wait for the next segment or for training, instead of in Redis."""

    location: str | None = None
    """Folder or URL such as s3://bucket/folder that takes them; without it all tokens stay in Redis. It belongs to one
    Redis, and every replica of the buffer sees it under this name."""
    min_tokens: int = Field(32768, ge=1)
    """Tokens of a trajectory in Redis from which on they are moved at the end of a segment."""
    retired_s: int = Field(86_400, ge=0)
    """Seconds that the file of a consumed trajectory is kept, so that a snapshot of Redis which names it can be
    restored."""
    abandoned_s: int = Field(600, ge=1)
    """Seconds after which a move that has not ended is taken for abandoned, and begun again with another file; the
    file of an abandoned one is deleted then."""
    sweep_s: float = Field(300.0, gt=0)
    """Seconds between two sweeps, which delete the files that nothing refers to."""


class BufferConfig(ServiceConfig):
    """Buffer service."""

    section: ClassVar[str] = "buffer"
    environment_aliases: ClassVar[dict[str, str]] = {"PERIGEE_REDIS_URL": "redis_url"}

    redis_url: SecretStr = SecretStr("")
    """redis://, rediss:// or unix:// URL of Redis (7.0 or later) or Valkey; empty starts a server in `data_path`."""
    data_path: Path = Path("buffer")
    """Folder of the server that the buffer starts."""
    local_server: LocalServerConfig = LocalServerConfig()
    """Server that the buffer starts."""
    durability: Literal["segments", "commits", "none"] = "segments"
    """Calls that wait for the disk: all but chunks within a segment; only runs, verdicts and commits; or none."""
    durability_timeout_s: float = Field(10.0, gt=0)
    """Seconds to wait for the disk; then the call fails as UNAVAILABLE and may be sent again."""
    request_timeout_s: float = Field(15.0, gt=0)
    """Seconds that one command of Redis may take."""
    connections: int = Field(32, ge=1)
    """Connections to Redis at most."""
    read_piece_tokens: int = Field(32768, ge=1, le=262144)
    """Tokens of one piece that ReadTrajectories streams; fewer where expert choices would make it more than 2 MiB."""
    page_trajectories: int = Field(1024, ge=1, le=16384)
    """Trajectories of one page that ListGroups streams; a larger group is a page of its own."""
    page_prompts: int = Field(1000, ge=1, le=10000)
    """Prompts of one page of ListPromptStatistics."""
    images: ImagesConfig = ImagesConfig()
    """Images of a run's prompts."""
    offload: OffloadConfig = OffloadConfig()
    """Files for the tokens of long trajectories."""
    limits: LimitsConfig = LimitsConfig()
    """Bounds of one request."""
