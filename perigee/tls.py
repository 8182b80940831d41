"""TLS: files of certificates, and why a handshake fails, which gRPC does not say."""

from __future__ import annotations

import socket
import ssl

from perigee.errors import InvalidArgumentError
from perigee.reload import read_file

PROBE_S = 3.0
# With an empty frame of settings.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
# More than a handshake takes.
_FLIGHTS = 4
_SPEAKS_TLS = "{} speaks TLS: name the roots that signed its certificate (ca_file)"
_EXPIRED, _NAME_MISMATCH, _ADDRESS_MISMATCH = 10, 62, 64


def read_pair(cert_file: str, key_file: str) -> tuple[bytes, bytes]:
    """Returns key and certificate chain; raises InvalidArgumentError unless they are PEM and belong together."""
    pair = read_file(key_file), read_file(cert_file)
    try:
        # Without a password, openssl would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except (ssl.SSLError, OSError) as error:
        raise InvalidArgumentError.for_field(
            cert_file, f"is no PEM certificate of the private key in {key_file}, which must have no password: {error}"
        ) from error
    return pair


def read_roots(ca_file: str) -> bytes:
    """Returns the roots; raises InvalidArgumentError unless they are PEM certificates."""
    roots = read_file(ca_file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
    except (ssl.SSLError, OSError) as error:
        raise InvalidArgumentError.for_field(ca_file, f"holds no PEM certificates: {error}") from error
    return roots


def find_tls_fault(
    address: str,
    *,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
    server_name: str | None = None,
) -> str | None:
    """Returns what is wrong between these files and the server at `address` (host:port); None when nothing is found.

    Makes a handshake of its own, which waits for PROBE_S seconds at most for the network.
    """
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["h2"])
    if ca_file is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file, password="")
        if _shake_hands(host.strip("[]"), int(port), context, server_name):
            return _SPEAKS_TLS.format(address) if ca_file is None else None
    except ssl.SSLCertVerificationError as error:
        return _describe_certificate(address, error, ca_file)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return None  # a server that stops
    except ssl.SSLError as error:
        return _describe_alert(address, error, ca_file)
    except (OSError, ValueError):
        return None  # the network, or an address of another kind: gRPC's own words say it
    if ca_file is None:
        return _SPEAKS_TLS.format(address)
    if cert_file is None or key_file is None:
        return f"{address} wants a client certificate: name one (cert_file, key_file)"
    if (fault := _find_client_fault(ca_file, cert_file, key_file)) is not None:
        return f"{address} refuses the client certificate {cert_file}: {fault}"
    return f"{address} ends the connection: its own roots may not have signed the client certificate {cert_file}"


def _shake_hands(host: str, port: int, context: ssl.SSLContext, server_name: str | None) -> bool:
    """Returns whether the server speaks after the handshake; raises ssl.SSLError when either side refuses it.

    By TLS 1.3 a server refuses a client's certificate after the client's handshake is done; gRPC's then closes the
    connection without a reason.
    """
    with (
        socket.create_connection((host, port), timeout=PROBE_S) as plain,
        context.wrap_socket(plain, server_hostname=server_name or host) as connection,
    ):
        connection.sendall(_HTTP2_PREFACE)
        return bool(connection.recv(1))


def _find_client_fault(ca_file: str, cert_file: str, key_file: str) -> str | None:
    """Returns why a server with these roots refuses the certificate: makes both sides of the handshake here."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(ca_file)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    for context in (client, server):
        context.load_cert_chain(cert_file, key_file, password="")
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(_FLIGHTS):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                expired = isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _EXPIRED
                return "it has expired" if expired else f"the roots in {ca_file} have not signed it"
    return None


def _describe_certificate(address: str, error: ssl.SSLCertVerificationError, ca_file: str | None) -> str:
    if error.verify_code == _EXPIRED:
        return f"the certificate of {address} has expired: renew it there"
    if error.verify_code in (_NAME_MISMATCH, _ADDRESS_MISMATCH):
        return f"the certificate of {address} is for another name ({error.verify_message}): use that (server_name)"
    return f"the certificate of {address} is not signed by the roots in {ca_file}: {error.verify_message}"


def _describe_alert(address: str, error: ssl.SSLError, ca_file: str | None) -> str | None:
    reason = error.reason or str(error)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
        return f"{address} does not speak TLS: leave out the roots (ca_file)" if ca_file else None
    if ca_file is None:
        return _SPEAKS_TLS.format(address) if "ALERT" in reason else None
    return f"the TLS handshake with {address} failed: {reason.lower().replace('_', ' ')}"
