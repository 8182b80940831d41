"""Plain HTTP port of a service for probes and Prometheus: `/healthz`, `/readyz`, `/metrics`.

It has neither TLS nor a token, so that an orchestrator can ask it: fence it by network policy off one machine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http.server import ThreadingHTTPServer

from prometheus_client import Gauge, MetricsHandler, disable_created_metrics

from perigee.errors import UnavailableError

# A loop that is silent for this long is stuck, and the orchestrator should start the process again.
LOOP_SILENCE_S = 5.0
READY = Gauge("perigee_ready", "1 while the service can do its work, as /readyz says.")
# Each counter and histogram would have a second series with the time at which it was made.
disable_created_metrics()  # type: ignore[no-untyped-call]


@asynccontextmanager
async def serving_probes(host: str, port: int, find_obstacle: Callable[[], str | None]) -> AsyncIterator[str]:
    """Answers probes for as long as the block lasts, from threads of its own, and yields where: host:port.

    `/healthz` is 200 while this event loop runs, `/readyz` while `find_obstacle` returns None; else 503 with one
    sentence. Raises UnavailableError when the port cannot be bound.
    """
    loop = asyncio.get_running_loop()
    READY.set_function(lambda: find_obstacle() is None)

    class Handler(MetricsHandler):
        timeout = 30

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/healthz":
                    self._reply(find_silence(loop))
                case "/readyz":
                    self._reply(find_obstacle())
                case "/metrics" | "/":
                    super().do_GET()
                case _:
                    self._reply(f"{self.path} is neither /healthz nor /readyz nor /metrics.", 404)

        def _reply(self, refusal: str | None, code: int = 503) -> None:
            self.send_response(200 if refusal is None else code)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            self.wfile.write(f"{refusal or 'ok'}\n".encode())

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = Server((host.strip("[]"), port), Handler)
    except OSError as error:
        raise UnavailableError(f"server.metrics_port: {host}:{port} cannot be bound; choose another port") from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="probes", daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_address[1]}"
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


def find_silence(loop: asyncio.AbstractEventLoop) -> str | None:
    """Returns a sentence when the event loop does not answer; called from another thread."""
    answered: concurrent.futures.Future[None] = concurrent.futures.Future()
    try:
        loop.call_soon_threadsafe(answered.set_result, None)
        answered.result(LOOP_SILENCE_S)
    except (TimeoutError, RuntimeError):  # a loop that is closed raises RuntimeError
        return f"The event loop has not answered for {LOOP_SILENCE_S:g} s: look at the log, then restart the service."
    return None
