"""Listening addresses, which decide how much callers see by default."""

from __future__ import annotations

import errno
import ipaddress
import socket

import psutil

from dverge_serve.errors import UserError


def beyond_loopback() -> bool:
    """Whether this process listens on an address that other machines may reach.

    Looks at the sockets themselves. If that is not possible, or nothing listens yet, the answer is
    yes, the careful one.
    """
    try:
        sockets = psutil.Process().net_connections(kind="inet")
    except (psutil.Error, OSError):
        return True
    hosts = [found.laddr.ip for found in sockets if found.status == psutil.CONN_LISTEN]
    return not hosts or not all(ipaddress.ip_address(host).is_loopback for host in hosts)


def require_free(host: str, port: int) -> None:
    """Check that a server can listen at `host`, an IP address, and `port`.

    Raises:
        UserError: it is taken, not allowed, or not an address of this machine.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError as error:
        raise UserError(f"host '{host}'", "an IP address, 127.0.0.1 or 0.0.0.0 say") from error
    if not 1 <= port <= 65535:
        raise UserError(f"port {port}", "1 to 65535")
    with socket.socket(family) as probe:
        # As servers do: connections of the last one may still linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} is in use", next_step="stop the other server or choose another"
                ) from error
            raise UserError(
                f"cannot listen at {host} port {port} ({error.strerror})", "a free address"
            ) from error
