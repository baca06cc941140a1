"""On the path of a process it has no network: every connection to another machine fails, and names are not looked up."""

import socket

LOCAL = ("127.0.0.1", "::1", "localhost", "")


class Offline(socket.socket):
    """A socket that reaches this machine alone."""

    def connect(self, address):  # type: ignore[no-untyped-def]
        """Refuse what is elsewhere."""
        self._check(address)
        return super().connect(address)

    def connect_ex(self, address):  # type: ignore[no-untyped-def]
        """Refuse what is elsewhere."""
        self._check(address)
        return super().connect_ex(address)

    def _check(self, address):  # type: ignore[no-untyped-def]
        if isinstance(address, tuple) and address[0] not in LOCAL:
            raise OSError(f"no network in this process: {address[0]}")


def _no_names(host, *rest, **more):  # type: ignore[no-untyped-def]
    if host in (None, *LOCAL):
        return _real(host, *rest, **more)
    raise socket.gaierror(f"no network in this process: {host}")


_real = socket.getaddrinfo
socket.socket = Offline  # type: ignore[misc]
socket.getaddrinfo = _no_names
