"""An http server that answers as a test says, for what real ones seldom do."""

import contextlib
import http.server
import re
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np

CONTENT = np.random.default_rng(0).bytes(100_000)


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request, and the means to answer it."""

    protocol_version = "HTTP/1.1"
    server: "FakeServer"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers))
        self.server.answer(self)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def send(self, status: int, body: bytes = b"", **headers: str | None) -> None:
        """An answer; a header's name has _ for -, and one that is None is left out."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def serve(self, content: bytes = CONTENT, **headers: str | None) -> None:
        """What a sound server answers."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"])
        assert wanted, self.headers["Range"]
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1) + 1
        if start >= len(content):
            self.send(416, Content_Range=f"bytes */{len(content)}")
        else:
            place = f"bytes {start}-{stop - 1}/{len(content)}"
            self.send(206, content[start:stop], **{"Content_Range": place, **headers})

    def log_message(self, *_: object) -> None:
        return


class FakeServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Callable[[Exchange], None]) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.answer = answer
        self.requests: list[tuple[str, Mapping[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serving(answer: Callable[[Exchange], None]) -> Iterator[FakeServer]:
    """A server whose every request `answer` answers."""
    server = FakeServer(answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
