"""Objects read over http, straight into the caller's memory. Buckets are read this way too: `object_store.py` only says
where an object is and with which signature."""

import functools
import http.client
import io
import os
import re
import socket
import ssl
import struct
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from shards.remote_store import (
    PROGRESS_BYTES,
    AbsentError,
    Failure,
    OutOfRangeError,
    RefusedError,
    RemoteStore,
    Version,
)
from shards.store import MAX_VECTOR, NoRangeError, StorageConfig, TransferError

_WAKE_BYTES = 1 << 18  # that wait in the kernel before it wakes the reader of a long answer


class HttpStore(RemoteStore):
    """Objects below a URL of an http(s) server, read only."""

    def __init__(self, url: str, options: StorageConfig) -> None:
        super().__init__(url, options)
        self._client = HttpClient(options)
        parts = urlsplit(self.url)
        self._quoted_url = parts._replace(path=_quoted(parts.path)).geturl()

    def open_body(self, name: str, offset: int, end: int | None, anew: bool) -> "HttpBody":
        token = self.options.http_token_file and _token(self.options.http_token_file)
        return self._client.get(f"{self._quoted_url}/{quote(name)}", f"{self.url}/{name}", offset, end, token)

    def size(self, name: str) -> int | None:
        version = Version()
        try:
            for _ in self._transfer(name, 0, 1, iter([[memoryview(bytearray(1))]]), version, expected=False):
                pass
        except FileNotFoundError:
            return None
        except EOFError:
            return 0
        return version.size

    def _read_only(self, *_: Any, **__: Any) -> NoReturn:
        raise io.UnsupportedOperation(
            f"{self.url}: http servers are only read from; list, or write to, the folder or bucket behind it."
        )

    writer = create = list = delete = sweep = _read_only


def _token(file: str) -> str:
    """The token in a file, read for each request since such files are renewed. ValueError if it can be none."""
    try:
        token = Path(file).expanduser().read_text("ascii", "replace").strip()
    except OSError as error:
        raise ValueError(f"http_token_file {file} cannot be read: {error.strerror}. Name the token's file.") from None
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(
            f"http_token_file {file} does not hold a token, which is one line of ASCII characters without spaces."
        )
    return token


def _quoted(url: str, encoding: str = "utf-8") -> str:
    """A URL, or its path, with what may not stand in a request quoted; what is quoted already stays."""
    return quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", url), safe="%:/?#[]@!$&'()*+,;=", encoding=encoding)


_MAX_REDIRECTS = 5


class HttpClient:
    """GET requests for ranges, over connections that are kept; safe in threads and after a fork."""

    def __init__(self, options: StorageConfig) -> None:
        self.options = options
        self._idle: dict[tuple[str, str], list[socket.socket]] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._redirects: dict[str, str] = {}

    def get(self, url: str, what: str, offset: int, end: int | None, token: str | None = None) -> "HttpBody":
        """The answer to a GET of the bytes from `offset` to `end`, or to the object's end.

        `what` names the object in errors, because the URL may hold a signature. `token` goes to the server in the URL,
        never to those that it redirects to."""
        headers = {
            "Accept-Encoding": "identity",
            "User-Agent": "audiosep-shards",
            "Connection": "keep-alive",
            "Range": f"bytes={offset}-{'' if end is None else end - 1}",  # always, so that answers tell the whole size
        }
        head = None
        try:
            head = self._follow(url, what, headers, {"Authorization": f"Bearer {token}"} if token else {})
            if head.status == 416:
                size = head.headers.get("content-range", "").rpartition("/")[2]
                raise OutOfRangeError(what, offset, int(size) if size.isdecimal() else None)
            if head.status not in (200, 206):
                raise _failure(head)
            return HttpBody(self, head, what, offset, end)
        except BaseException:
            self.forget_redirect(what)
            if head:
                head.connection.close()
            raise

    def _follow(self, url: str, what: str, headers: dict[str, str], authorization: dict[str, str]) -> "_Head":
        """The first answer that is no redirect. Where an object was found last is where it is looked for next."""
        target = self._redirects.get(what, url)
        for _ in range(1 + _MAX_REDIRECTS):
            parts = urlsplit(target)
            head = self._ask(parts, headers | (authorization if parts[:2] == urlsplit(url)[:2] else {}))
            if head.status not in (301, 302, 303, 307, 308):
                return head
            head.connection.close()
            location = head.headers.get("location")
            if not location:
                reason = f"the server answered {head.reason}, no Location: for S3, is the region right?"
                raise Failure(reason, attempts=3)
            target = urljoin(target, _quoted(location, "latin-1"))
            if (scheme := urlsplit(target).scheme) not in ("http", "https"):
                raise Failure(f"the server redirects to {scheme}:, and only http and https are followed", attempts=3)
            self._redirects[what] = target
        raise Failure(f"the server redirects in a circle, or more than {_MAX_REDIRECTS} times", attempts=3)

    def forget_redirect(self, what: str) -> None:
        """Ask the server itself next time: where it redirected to may be gone, or its signature expired."""
        self._redirects.pop(what, None)

    def _ask(self, target: SplitResult, headers: dict[str, str]) -> "_Head":
        """Send a GET and read the answer's head. A kept connection that the server has closed meanwhile is replaced."""
        proxy = _proxy(target.scheme, target.netloc)
        resource = f"{target.path or '/'}{'?' + target.query if target.query else ''}"
        if proxy and target.scheme == "http":
            resource, headers = target.geturl(), headers | proxy.headers
        lines = [f"{key}: {value}\r\n" for key, value in {"Host": target.netloc, **headers}.items()]
        request = f"GET {resource} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1")
        while True:
            kept = self._take(target)
            connection = kept or _connect(target, proxy, self.options)
            try:
                connection.sendall(request)
                return _Head(connection, target, self.options.stall_seconds)
            except (OSError, Failure) as error:
                connection.close()
                if not kept or isinstance(error, TimeoutError):
                    raise error if isinstance(error, Failure) else Failure(f"{type(error).__name__}: {error}") from None

    def _take(self, target: SplitResult) -> socket.socket | None:
        with self._lock:
            if self._process != os.getpid():  # connections of the parent process, which goes on using them
                self._idle, self._process = {}, os.getpid()
            idle = self._idle.get((target.scheme, target.netloc))
            return idle.pop() if idle else None

    def keep(self, target: SplitResult, connection: socket.socket) -> None:
        with self._lock:
            self._idle.setdefault((target.scheme, target.netloc), []).append(connection)


class _Proxy(NamedTuple):
    host: str
    port: int
    headers: dict[str, str]  # with its password


def _connect(target: SplitResult, proxy: _Proxy | None, options: StorageConfig) -> socket.socket:
    """A connection to a URL's server, with TLS for https and through a proxy where the environment names one. Raises
    ValueError if the URL can be no server's, TransferError for a certificate that nobody vouches for, else Failure."""
    server, seconds = f"{target.scheme}://{target.netloc}", options.stall_seconds
    try:
        if not target.hostname:
            raise ValueError("it names no server")
        host, port = (proxy.host, proxy.port) if proxy else (target.hostname, target.port)
        maker = http.client.HTTPConnection(host, port, timeout=seconds)
        if target.scheme == "https":
            maker = http.client.HTTPSConnection(host, port, timeout=seconds, context=_tls())
            if proxy:
                maker.set_tunnel(target.hostname, target.port or 443, proxy.headers)
        maker.connect()
    except ssl.SSLCertVerificationError as error:
        raise TransferError(f"{server}: {error}. Set SSL_CERT_FILE to its CA.") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise ValueError(f"{server} cannot be connected to: {error}.") from None
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"{type(error).__name__}: {error}") from None
    if target.scheme == "http":  # the kernel watches the time, so that one call can fill much memory
        maker.sock.settimeout(None)
        clock = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            maker.sock.setsockopt(socket.SOL_SOCKET, option, clock)
    return maker.sock


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@functools.cache
def _proxy(scheme: str, netloc: str) -> _Proxy | None:
    """The proxy that the environment names for a server, as curl reads it (https_proxy, all_proxy, no_proxy, ...)."""
    proxies = urllib.request.getproxies()
    url = proxies.get(scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(netloc):
        return None
    with suppress(ValueError):  # its text could show the password
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme == "http" and parts.hostname:
            secret = unquote(f"{parts.username}:{parts.password or ''}").encode()
            headers = {"Proxy-Authorization": f"Basic {b64encode(secret).decode()}"} if parts.username else {}
            return _Proxy(parts.hostname, parts.port or 80, headers)
    raise ValueError(
        f"The environment names a proxy for {scheme}://{netloc} that is not of the form [http://][USER:PASSWORD@]HOST:"
        f"PORT. Others are not supported: set {scheme}_proxy to such a one, or no_proxy to go without."
    )


class _Head:
    """Status line and headers of an answer, with the connection that the rest comes from."""

    def __init__(self, connection: socket.socket, target: SplitResult, stall_seconds: float) -> None:
        self.connection, self.target = connection, target
        data, end, deadline = b"", -1, time.monotonic() + stall_seconds
        while end < 0:
            try:
                piece = connection.recv(16384)
            except BlockingIOError:
                raise TimeoutError("no answer came within stall_seconds") from None
            data += piece
            end = data.find(b"\r\n\r\n")
            if not piece or len(data) > 1 << 17 or time.monotonic() > deadline:
                raise Failure(f"no answer: {len(data)} bytes of its head, then " + ("silence" if piece else "the end"))
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        match = re.match(r"HTTP/1\.[01] (\d{3})", first)
        if not match:
            raise Failure(f"not an http answer: {first[:80]!r}")
        self.status, self.reason = int(match[1]), first[9:80]
        self.headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        self.rest = data[end + 4 :]
        self.keeps_alive = first.startswith("HTTP/1.1") and self.headers.get("connection", "").lower() != "close"


def _failure(head: _Head) -> Failure:
    """What an answer that brings no bytes means for another attempt."""
    reason = f"the server answered {head.reason}"
    is_expired = head.status == 400 and head.target.query  # so S3 answers when the session that signed is over
    if head.status in (401, 403) or is_expired:
        return Failure(reason, error=RefusedError, attempts=3)  # once more with fresh credentials
    if head.status in (404, 410):
        return Failure(reason, error=AbsentError, attempts=3)
    if head.status in (408, 425, 429) or head.status >= 500:
        seconds = _retry_after(head.headers.get("retry-after", ""))
        asked = f" and asks for {seconds:.0f} s of pause" if seconds else ""
        return Failure(reason + asked, retry_after=seconds)
    return Failure(reason, attempts=1)


def _retry_after(text: str) -> float:
    """Seconds to wait that a server asked for as a number or date; 0.0 if it is neither or in the past."""
    try:
        if text.isdecimal():
            return float(text)
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # the latter for a date without its zone
        return 0.0


class HttpBody:
    """The bytes of one answer, checked against what was asked for, and how fast they come."""

    def __init__(self, client: HttpClient, head: _Head, what: str, offset: int, end: int | None) -> None:
        self._client, self._head, self._what = client, head, what
        self._stall_seconds = client.options.stall_seconds
        self._window_start, self._window_bytes = time.monotonic(), 0
        self._rest = memoryview(head.rest)
        self._skip = 0
        self.tag = head.headers.get("etag") or head.headers.get("last-modified")
        length = _length(head)
        if head.status == 206:
            first, last, self.size = _content_range(head)
            if first != offset or last + 1 - first != length or (end is not None and last >= end):
                raise Failure(f"asked for bytes {offset} to {end}, the server sends {first} to {last + 1}")
            if last + 1 != end and last + 1 != self.size:
                raise Failure(f"asked for bytes {offset} to {end}, the server stops at {last + 1} of {self.size}")
            self._remaining = length
        else:
            if offset and end is not None:
                raise Failure(
                    "the server ignores Range, so single samples cannot be read; set cache_dir, which takes whole "
                    "shards, or read the tars in sequence",
                    error=NoRangeError,
                    attempts=3,
                )
            if offset > length:
                raise OutOfRangeError(what, offset, length)
            self.size, self._skip = length, offset
            self._remaining = min(length, length if end is None else end) - offset
        self._reusable = head.keeps_alive and self._skip + self._remaining == length

    def read_into(self, views: Sequence[memoryview]) -> int:
        while self._skip:
            self._skip -= self._receive([memoryview(bytearray(min(self._skip, PROGRESS_BYTES)))])
        if not self._remaining:
            return 0
        count = self._receive(_first_bytes(views, self._remaining))
        self._remaining -= count
        return count

    def _receive(self, views: Sequence[memoryview]) -> int:
        if self._rest:
            count = min(len(self._rest), len(views[0]))
            views[0][:count], self._rest = self._rest[:count], self._rest[count:]
            return count
        try:
            count = _receive(self._head.connection, views)
        except OSError as error:
            raise Failure(f"{type(error).__name__}: {error}") from None
        if not count:
            raise Failure(f"the connection was closed {self._remaining} bytes early")
        self._window_bytes += count
        now = time.monotonic()
        if now - self._window_start > self._stall_seconds:
            if self._window_bytes < PROGRESS_BYTES:
                raise Failure(f"only {self._window_bytes} bytes came in {now - self._window_start:.1f} s")
            self._window_start, self._window_bytes = now, 0
        return count

    def close(self) -> None:
        """Give the connection back if all was read from it, close it otherwise."""
        is_done = not self._remaining and not self._skip
        if not is_done:
            self._client.forget_redirect(self._what)
        if is_done and self._reusable:
            self._client.keep(self._head.target, self._head.connection)
        else:
            self._head.connection.close()


def _receive(connection: socket.socket, views: Sequence[memoryview]) -> int:
    """Bytes that were put into the views, 0 at the end of the connection. Without TLS all are waited for in one call,
    until the connection's time is over, and of many those to the last _WAKE_BYTES; fewer calls and fewer wake-ups
    leave more of the processor to others."""
    if isinstance(connection, ssl.SSLSocket):
        return connection.recv_into(views[0])
    views = views[:MAX_VECTOR]
    wanted = sum(view.nbytes for view in views)
    is_long = wanted > 4 * _WAKE_BYTES
    try:
        if is_long:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE_BYTES)
            views = _first_bytes(views, wanted - _WAKE_BYTES)
        return connection.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
    except BlockingIOError:
        raise TimeoutError("no byte came within stall_seconds") from None
    finally:
        if is_long:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _first_bytes(views: Sequence[memoryview], count: int) -> list[memoryview]:
    found = []
    for view in views:
        if count > 0:
            found.append(view[:count])
            count -= view.nbytes
    return found


def _length(head: _Head) -> int:
    """Content-Length of an answer, without which a cut connection would look like the end."""
    encoding = head.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Failure(
            f"the server encodes its answers ({encoding}), which was not asked for, so that the object's own bytes are "
            "not to be had; switch that off for these files",
            attempts=3,
        )
    length, transfer = (head.headers.get(key, "") for key in ("content-length", "transfer-encoding"))
    if transfer or not length.isdecimal():
        raise Failure(
            f"the server tells no length (Content-Length {length!r}, Transfer-Encoding {transfer!r}), so that a broken "
            "connection would pass for the end; have it serve the files as they are, without a filter or gateway",
            attempts=3,
        )
    return int(length)


def _content_range(head: _Head) -> tuple[int, int, int | None]:
    text = head.headers.get("content-range", "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text)
    if not match:
        raise Failure(f"the answer has Content-Range {text!r}")
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
