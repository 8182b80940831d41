"""The trainer's RPCs over HTTP, for operators: what it has loaded, and its memory in a hybrid deployment."""

from __future__ import annotations

from pathlib import Path

from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.http import HttpRoute

OPENAPI_FILE = Path(__file__).with_name("openapi.json")
ROUTES = (
    HttpRoute("GET", "/v1/control/state", "GetState", pb.GetStateRequest, pb.GetStateResponse),
    HttpRoute("POST", "/v1/control/offload", "Offload", pb.OffloadRequest, pb.OffloadResponse),
    HttpRoute("POST", "/v1/control/onload", "Onload", pb.OnloadRequest, pb.OnloadResponse),
)
