# SPDX-License-Identifier: Apache-2.0
"""Ports of servers that tests and benchmarks start."""

import socket

HOST = "127.0.0.1"


def free_port() -> int:
    """A port for a server that is started later; until this process ends, nobody else gets it.

    A server needs seconds until it binds its port. If nobody held the port, a client's connection
    could be given it meanwhile. The socket that holds it does not listen. So the server can bind
    the port too, as long as it sets ``SO_REUSEADDR``, which servers do.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((HOST, 0))
    _HELD.append(holder)
    port: int = holder.getsockname()[1]
    return port


_HELD: list[socket.socket] = []
"""What holds the ports."""


def is_free(port: int) -> bool:
    """Whether a server could listen on this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
