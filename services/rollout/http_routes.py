"""The rollout worker's RPCs over HTTP, for operators: what it does, and its memory in a hybrid deployment."""

from __future__ import annotations

from pathlib import Path

from perigee.rollout.v1 import rollout_pb2 as pb
from services.kit.http import HttpRoute

OPENAPI_FILE = Path(__file__).with_name("openapi.json")
ROUTES = (
    HttpRoute("GET", "/v1/control/state", "GetState", pb.GetStateRequest, pb.GetStateResponse),
    HttpRoute("POST", "/v1/control/leave", "Leave", pb.LeaveRequest, pb.LeaveResponse),
    HttpRoute("POST", "/v1/control/come_back", "ComeBack", pb.ComeBackRequest, pb.ComeBackResponse),
)
