"""TLS of a server from files that may be replaced: each new connection gets the certificates as they are."""

from __future__ import annotations

import ssl
import time

import grpc

from perigee.reload import Reloaded
from perigee.tls import read_pair, read_roots
from services.kit.config import ServerConfig

HANDOVER_S = 0.5


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """Returns TLS for gRPC, None where the server speaks in clear.

    Raises InvalidArgumentError naming a file that is no certificate.
    """
    if config.tls_cert_file is None:
        return None
    files = Reloaded(_files(config), lambda: _read_configuration(config))
    used = files.value

    def fetch_change() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        if (current := files.value) is used:
            return None
        # gRPC holds new handshakes back meanwhile, in threads of its own. One that has read the address of the old
        # certificates, but does not share in them yet, would find them freed, and the process would crash.
        time.sleep(HANDOVER_S)
        used = current
        return current

    return grpc.dynamic_ssl_server_credentials(used, fetch_change, _client_roots(config) is not None)  # type: ignore[arg-type]


def server_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Returns TLS for HTTP, None where the server speaks in clear.

    Raises InvalidArgumentError naming a file that is no certificate.
    """
    if config.tls_cert_file is None:
        return None
    files = Reloaded(_files(config), lambda: _read_context(config))
    context = files.value

    def choose(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        connection.context = files.value

    # Called in every handshake, whether it names a server or not.
    context.sni_callback = choose
    return context


def _read_configuration(config: ServerConfig) -> grpc.ServerCertificateConfiguration:
    assert config.tls_cert_file is not None
    assert config.tls_key_file is not None
    roots = _client_roots(config)
    pair = read_pair(config.tls_cert_file, config.tls_key_file)
    return grpc.ssl_server_certificate_configuration([pair], read_roots(roots) if roots else None)


def _read_context(config: ServerConfig) -> ssl.SSLContext:
    assert config.tls_cert_file is not None
    assert config.tls_key_file is not None
    read_pair(config.tls_cert_file, config.tls_key_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.tls_cert_file, config.tls_key_file)
    if roots := _client_roots(config):
        read_roots(roots)
        context.load_verify_locations(roots)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client_roots(config: ServerConfig) -> str | None:
    """Returns the roots of the callers' certificates, None where they show none."""
    return config.tls_ca_file if config.tls_verify_clients else None


def _files(config: ServerConfig) -> tuple[str | None, ...]:
    return config.tls_cert_file, config.tls_key_file, _client_roots(config)
