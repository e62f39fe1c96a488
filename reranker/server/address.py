"""Check an address before gunicorn binds it, and log it as clients reach it."""

from __future__ import annotations

import errno
import ipaddress
import shlex
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

_ANY = "write 0.0.0.0 for all addresses of this machine, or 127.0.0.1 for this machine alone"


def bind_error(host: str, port: int, *, reuse_port: bool = False) -> OSError | None:
    """Bind a socket with gunicorn's options, close it, and return the error if there was one."""
    family = socket.AF_INET6 if ":" in host and "%" not in host else socket.AF_INET  # as gunicorn decides
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port and hasattr(socket, "SO_REUSEPORT"):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind((host, port))
    except OSError as error:
        return error
    except OverflowError:  # an address of the command line
        return OSError(errno.EINVAL, "not a port")
    except UnicodeError:  # a label that is empty or too long
        return socket.gaierror(socket.EAI_NONAME, "not a host name")
    return None


def explain(error: OSError, host: str, port: int, host_given: str, port_given: str) -> str:
    """Return one line with the reason why an address cannot be bound and how to fix it.

    `host_given`, `port_given`: setting, value and source of each.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{port_given} cannot be used: another program listens on {where}; stop it (ss -ltnp) or set another port"
        )
    if not 0 <= port <= 65535:
        return f"{port_given} cannot be used: a port is a number from 0 to 65535"
    if error.errno in (errno.EACCES, errno.EPERM) and 0 < port < 1024:
        return f"{port_given} cannot be used: a port below 1024 needs more rights; set one from 1024 to 65535"
    if isinstance(error, socket.gaierror):
        return f"{host_given} cannot be used: it does not resolve ({error.strerror}); {_ANY}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host_given} cannot be used: it is no address of this machine; {_ANY}"
    return f"{host_given} cannot be used: {error.strerror or error}; {_ANY}"


def is_local(listeners: Sequence[str]) -> bool:
    """Return whether only this machine can reach the listeners; False if there are none."""
    return bool(listeners) and all(
        one.startswith("unix:") or ipaddress.ip_address(urlsplit(one).hostname or "0.0.0.0").is_loopback
        for one in listeners
    )


def curl_target(listeners: Sequence[str]) -> str:
    """Return the arguments with which curl reaches the first listener; PORT is a placeholder if there is none."""
    first = listeners[0] if listeners else ""
    if first.startswith("unix:"):
        return f"--unix-socket {shlex.quote(first[5:])} http://localhost"
    return (first or "http://127.0.0.1:PORT").replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
