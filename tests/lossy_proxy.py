"""An http proxy before a real server that breaks answers at random: the network and the servers at their worst.

`python tests/lossy_proxy.py UPSTREAM_PORT --latency 0.03` runs one by itself and prints its port."""

import argparse
import math
import os
import random
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence

FAULTS = (
    "cut",  # closed or reset after any number of bytes, in the head or the body
    "status",  # 500, 503 or 429, at times with Retry-After
    "refused",  # 403 or 404
    "stall",  # silence after any number of bytes
    "drip",  # a byte now and then
    "length",  # a Content-Length that is too small or too large
    "range",  # a Content-Range that is not what was asked for
    "no-range",  # the whole object instead of the range
    "bytes",  # a flipped bit, which only a checksum can tell
)


class LossyProxy:
    """Listens on `port` while its block runs. A share `rate` of the answers suffers one of the `faults`, and each
    answer comes `latency` seconds late. `counts` says how often each fault was made. With `upload_rate` all bodies of
    requests share a line of so many bytes/s."""

    def __init__(
        self,
        upstream: int,
        faults: Sequence[str] = FAULTS,
        rate: float = 0.0,
        latency: float = 0.0,
        seed: int = 0,
        upload_rate: float = math.inf,
    ) -> None:
        self.upstream, self.faults, self.rate, self.latency = upstream, faults, rate, latency
        self.counts: Counter[str] = Counter()
        self.closing = threading.Event()
        self.lock, self._random = threading.Lock(), random.Random(seed)
        self.upload_rate, self._line_free = upload_rate, 0.0
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self._server.daemon_threads = self._server.allow_reuse_address = True
        self._server.request_queue_size = 256
        self._server.block_on_close = False
        self._server.proxy = self  # type: ignore[attr-defined]
        self._server.server_bind()
        self._server.server_activate()
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def draw(self) -> tuple[str | None, float]:
        """The fault of one answer, and a number in [0, 1) that says where it strikes."""
        with self.lock:
            fault = self._random.choice(self.faults) if self._random.random() < self.rate else None
            if fault:
                self.counts[fault] += 1
            return fault, self._random.random()

    def wait_for_line(self, num_bytes: int) -> None:
        """Sleep until the line that all uploads share has passed so many bytes on."""
        with self.lock:
            self._line_free = max(self._line_free, time.monotonic()) + num_bytes / self.upload_rate
            seconds = self._line_free - time.monotonic()
        time.sleep(max(0.0, seconds))

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def __enter__(self) -> "LossyProxy":
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(socketserver.BaseRequestHandler):
    """One client's connection: requests pass unchanged, answers may not."""

    def handle(self) -> None:
        self.proxy: LossyProxy = self.server.proxy  # type: ignore[attr-defined]
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upstream: socket.socket | None = None
        try:
            while request := _read_head(self.request):
                upstream = upstream or socket.create_connection(("127.0.0.1", self.proxy.upstream), timeout=20)
                upstream.sendall(request[0])
                body = request[1]
                left = _length(request[0])
                while True:
                    self.proxy.wait_for_line(len(body))
                    upstream.sendall(body)
                    left -= len(body)
                    if left <= 0:
                        break
                    if not (body := self.request.recv(1 << 18)):
                        return
                if not self._answer(request[0], upstream):
                    return
        except OSError:
            return  # either side went away, which is what this proxy is for
        finally:
            if upstream:
                upstream.close()

    def _answer(self, request: bytes, upstream: socket.socket) -> bool:
        """Pass one answer on, broken or whole; whether the connection can be used further."""
        answer = _read_head(upstream)
        if answer is None:
            return False
        if self.proxy.latency:
            time.sleep(self.proxy.latency)
        head, body = answer
        fault, where = self.proxy.draw()
        length = 0 if request.startswith(b"HEAD") else _length(head)
        if fault == "status":
            status = [b"500 Oops", b"503 Slow Down", b"429 Too Many"][int(where * 3)]
            retry = b"Retry-After: 1\r\n" if where > 0.97 else b""
            self.request.sendall(b"HTTP/1.1 " + status + b"\r\n" + retry + b"Content-Length: 4\r\n\r\nbusy")
            return False
        if fault == "refused":
            status = b"403 Forbidden" if where < 0.5 else b"404 Not Found"
            self.request.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
            return False
        if fault == "length":
            head = _replace_length(head, max(0, int(length * 2 * where)))
        if fault == "range":
            head = re.sub(
                rb"(?i)(content-range: bytes )(\d+)", lambda found: found[1] + b"%d" % (int(found[2]) + 1), head
            )
        if fault == "no-range":
            head = head.replace(b"206 Partial Content", b"200 OK", 1)
        total = len(head) + length
        limit = int(total * where) if fault in ("cut", "stall", "drip") else None
        flip = int(length * where) if fault == "bytes" and length else None
        self._pass_on(head, body, length, upstream, limit, flip, drips=fault == "drip")
        if fault == "cut":
            if where < 0.5:  # reset instead of an orderly end
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault == "stall":
            self.proxy.closing.wait(5)
        return fault is None

    def _pass_on(
        self,
        head: bytes,
        body: bytes,
        length: int,
        upstream: socket.socket,
        limit: int | None,
        flip: int | None,
        drips: bool,
    ) -> None:
        """Send head and body; at most `limit` bytes of both (then one now and then, if it `drips`), and with a bit of
        the body's byte `flip` turned."""
        self.request.sendall(head if limit is None else head[:limit])
        if limit is None and flip is None and len(body) < length:
            self.request.sendall(body)
            self._splice(upstream, length - len(body))
            return
        room = None if limit is None else max(0, limit - len(head))
        buffer, done = bytearray(1 << 18), 0
        while done < length or body:
            if not body:
                count = upstream.recv_into(buffer, min(len(buffer), length - done))
                if not count:
                    raise ConnectionError("the server ended early")
                piece = memoryview(buffer)[:count]
            else:
                piece, body = memoryview(bytearray(body)), b""
            if flip is not None and done <= flip < done + len(piece):
                piece[flip - done] ^= 1
            if room is not None and done + len(piece) > room:
                self.request.sendall(piece[: room - done])
                for byte in piece[room - done :] if drips else b"":
                    self.proxy.closing.wait(0.02)
                    self.request.sendall(bytes([byte]))
                return
            self.request.sendall(piece)
            done += len(piece)
        if b"chunked" in head:  # short lists; the last chunk ends them
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                tail += upstream.recv(1 << 18)
            self.request.sendall(tail)

    def _splice(self, upstream: socket.socket, left: int) -> None:
        """Let the kernel pass bytes on by itself, so that a benchmark's proxy takes little from those it serves."""
        upstream.settimeout(None)
        reading, writing = os.pipe()
        try:
            while left:
                waiting = os.splice(upstream.fileno(), writing, min(left, 1 << 20))
                if not waiting:
                    raise ConnectionError("the server ended early")
                left -= waiting
                while waiting:
                    waiting -= os.splice(reading, self.request.fileno(), waiting)
        finally:
            os.close(reading)
            os.close(writing)


def _read_head(connection: socket.socket) -> tuple[bytes, bytes] | None:
    """Head of a request or answer and what came after it; None at the connection's end."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        piece = connection.recv(1 << 16)
        if not piece:
            return None
        data += piece
    return data[: end + 4], data[end + 4 :]


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return int(found[1]) if found else 0


def _replace_length(head: bytes, length: int) -> bytes:
    return re.sub(rb"(?i)(\r\ncontent-length: )\d+", rb"\g<1>%d" % length, head)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream", type=int)
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    proxy = LossyProxy(options.upstream, latency=options.latency)
    print(proxy.port, flush=True)
    proxy.serve()
