"""The sandbox's RPCs over HTTP."""

from __future__ import annotations

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.http import HttpRoute

ROUTES = (
    HttpRoute("POST", "/v1/execute", "Execute", pb.ExecuteRequest, pb.ExecuteResponse),
    HttpRoute(
        "POST", "/v1/execute/stream", "ExecuteStream", pb.ExecuteStreamRequest, pb.ExecuteStreamResponse, streaming=True
    ),
    HttpRoute(
        "POST", "/v1/execute/batch", "ExecuteBatch", pb.ExecuteBatchRequest, pb.ExecuteBatchResponse, streaming=True
    ),
    HttpRoute("POST", "/v1/judge", "Judge", pb.JudgeRequest, pb.JudgeResponse),
    HttpRoute("POST", "/v1/judge/batch", "JudgeBatch", pb.JudgeBatchRequest, pb.JudgeBatchResponse, streaming=True),
    HttpRoute("POST", "/v1/sessions", "CreateSession", pb.CreateSessionRequest, pb.CreateSessionResponse),
    HttpRoute("POST", "/v1/sessions/{session_id}/cells", "RunCell", pb.RunCellRequest, pb.RunCellResponse),
    HttpRoute("DELETE", "/v1/sessions/{session_id}", "CloseSession", pb.CloseSessionRequest, pb.CloseSessionResponse),
    HttpRoute("GET", "/v1/runtimes", "ListRuntimes", pb.ListRuntimesRequest, pb.ListRuntimesResponse),
)
