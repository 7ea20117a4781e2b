"""A small TCP proxy on the loopback that does what networks do: it delays, resets, falls silent, and loses the answer to a commit.

It runs in a thread of its own. What it shall do next is set on it at any time; what it has done is counted.
"""

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

COMMIT = b"\x00\x02\xb0\x12\x00\x00"
"""Bolt's message COMMIT as it stands on the wire: a chunk of two bytes, a structure without fields whose tag is 0x12."""


@dataclass
class Counts:
    connections: int = 0
    resets: int = 0
    lost_answers: int = 0
    to_client: int = 0  # bytes


class Proxy:
    """Stands before `target` (a port of the loopback) while it is open; a context manager.

    delay: seconds by which every piece is held back. lose_answers: how many of the next commits are handed on and never answered: the client's
    connection is reset instead. cut_after: bytes to clients, from when it is set on, after which all connections are reset, once. silent: nothing
    is handed on, and nobody is told. closed: new connections are reset at once.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay, self.lose_answers, self.silent, self.closed = 0.0, 0, False, False
        self.cut_after: int | None = None
        self.counts = Counts()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._joined, "127.0.0.1", 0), self._loop).result(10)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def reset(self) -> None:
        """Reset every connection that there is."""
        asyncio.run_coroutine_threadsafe(self._reset_all(), self._loop).result(10)

    async def _end(self) -> None:
        self._server.close()
        await self._reset_all()
        for task in asyncio.all_tasks(self._loop) - {asyncio.current_task()}:
            task.cancel()

    async def _reset_all(self) -> None:
        for writer in list(self._writers):
            self._reset(writer)

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        """Close without a farewell: the other end gets an RST."""
        taken: socket.socket | None = writer.get_extra_info("socket")
        self._writers.discard(writer)
        if taken is not None and not writer.is_closing():
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            self.counts.resets += 1

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        self._writers.add(writer)
        if self.closed:
            self._reset(writer)
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self._reset(writer)
            return
        self._writers.add(back)
        link = _Link(self, writer, back)
        with suppress(asyncio.CancelledError):  # by the proxy's end
            await asyncio.gather(link.forth(reader), link.back(there), return_exceptions=True)
        for end in (writer, back):
            self._writers.discard(end)
            end.close()

    async def _held(self) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)
        while self.silent:
            await asyncio.sleep(0.02)


class _Link:
    """One connection: the client's end, the server's, and whether the answer to the last commit is to be lost."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.proxy, self.client, self.server, self.losing = proxy, client, server, False

    async def forth(self, reader: asyncio.StreamReader) -> None:
        tail = b""
        while data := await reader.read(65536):
            await self.proxy._held()
            if COMMIT in tail + data and self.proxy.lose_answers > 0:
                self.proxy.lose_answers -= 1
                self.losing = True
            tail = (tail + data)[1 - len(COMMIT) :]  # one byte less than the message: none is seen twice
            self.server.write(data)
            await self.server.drain()
        self.server.close()

    async def back(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            await self.proxy._held()
            if self.losing:  # what comes first behind a commit is its answer: the server has committed
                self.proxy.counts.lost_answers += 1
                self.proxy._reset(self.client)
                self.proxy._reset(self.server)
                return
            self.proxy.counts.to_client += len(data)
            if self.proxy.cut_after is not None:
                self.proxy.cut_after -= len(data)
                if self.proxy.cut_after <= 0:
                    self.proxy.cut_after = None
                    await self.proxy._reset_all()
                    return
            self.client.write(data)
            await self.client.drain()
        self.client.close()
