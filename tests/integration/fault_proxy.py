"""A proxy for HTTP that breaks answers in the ways of real networks, in a fixed or a seeded sequence.

reset     the connection is reset inside the body
cut       it ends inside the body, in good order
stall     the body stops coming, the connection stays
503, 429  an answer of the server, with Retry-After
length    Content-Length is not that of the body
damage    one byte of the body is another one
ranges    the request's range is lost, so that the server sends everything
etag      the answer names another version
page      somebody else answers: 200 and a page of HTML
"""

import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress

FAULTS = ("reset", "cut", "stall", "503", "429", "length", "damage", "ranges", "etag", "page")


def storm(seed: int, share: float, faults: Iterable[str]) -> Iterator[str]:
    """For each request a fault, or "" in 1 - `share` of them."""
    generator, faults = random.Random(seed), tuple(faults)
    while True:
        yield generator.choice(faults) if generator.random() < share else ""


class FaultProxy:
    """Listens on a free port of the loopback; `faults` are those of the requests in the order of their arrival.

    After the last one all is well. `seen` counts requests by fault. Each connection serves one request.
    """

    def __init__(self, upstream: int, faults: Iterable[str] = (), *, seed: int = 0, retry_after: str = "0") -> None:
        self.upstream, self.faults, self.retry_after = upstream, iter(faults), retry_after
        self.seen: Counter[str] = Counter()
        self.requests: list[str] = []
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which close alone does not
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.upstream)) as server:
            request = _head(client)
            if not request:
                return
            with self._lock:
                fault = next(self.faults, "")
                self.seen[fault] += 1
                self.requests.append(request.decode().splitlines()[0])
                where, other = self._random.random(), self._random.randrange(1, 256)
            try:
                self._answer(client, server, request, fault, where, other)
            except OSError:  # the client has left
                return

    def _answer(
        self, client: socket.socket, server: socket.socket, request: bytes, fault: str, where: float, other: int
    ) -> None:
        if fault in ("503", "429"):
            client.sendall(f"HTTP/1.1 {fault} Busy\r\nRetry-After: {self.retry_after}\r\n".encode() + _END)
            return
        if fault == "page":
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\nConnection: close\r\n\r\n<html></html>")
            return
        if fault == "ranges":
            request = re.sub(rb"\r\nRange:[^\r]*", b"", request, flags=re.IGNORECASE)
        server.sendall(
            re.sub(rb"\r\nConnection:[^\r]*", b"", request[:-2], flags=re.IGNORECASE) + b"Connection: close\r\n\r\n"
        )
        head = _head(server)
        found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        length = int(found[1]) if found else 0
        if fault == "length":
            head = re.sub(rb"(\r\ncontent-length: *)\d+", rb"\g<1>%d" % (length + 7), head, flags=re.IGNORECASE)
        if fault == "etag":
            head = re.sub(rb"(\r\netag: *)[^\r]*", rb'\g<1>"other"', head, flags=re.IGNORECASE)
        client.sendall(head)
        stop, sent = int(where * length), 0
        while block := server.recv(1 << 16):
            if fault == "damage" and sent <= stop < sent + len(block):
                block = block[: stop - sent] + bytes([block[stop - sent] ^ other]) + block[stop - sent + 1 :]
            if fault in ("reset", "cut", "stall") and sent + len(block) > stop:
                client.sendall(block[: stop - sent])
                return self._break(client, fault)
            client.sendall(block)
            sent += len(block)

    def _break(self, client: socket.socket, fault: str) -> None:
        if fault == "reset":  # no linger: close sends RST, and the receiver may lose what it has not read
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.settimeout(0.1)
        while fault == "stall" and not self._closed.is_set():
            with suppress(TimeoutError):
                if not client.recv(1):
                    return


_END = b"Content-Length: 0\r\nConnection: close\r\n\r\n"


def _head(connection: socket.socket) -> bytes:
    """Everything up to the empty line; byte by byte, so that the body stays in the socket."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        head += byte
    return head
