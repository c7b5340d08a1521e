"""Connections to the page's server on which nothing is asked."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

PATIENCE = 20.0
"""Seconds in which the head of a first request must have come."""
MOST = 256
"""How many there are before those that wait for their first request are ended at once."""
BACKLOG = 128
"""How many are taken in at a time. A process may often have 1024 open files."""


class Connection(AutoHTTPProtocol):
    """A connection that ends where nothing is asked on it: many would keep all others out.

    After the first answer uvicorn ends it when it is idle.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Is told by the event loop of the new connection."""
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self.end_if_silent)
        if len(self.connections) > MOST:
            others: set[Any] = self.connections - {self}
            for other in others:
                other.end_if_silent()

    def end_if_silent(self) -> None:
        """Ends it unless a request has come."""
        if self.cycle is None:
            self.transport.close()
