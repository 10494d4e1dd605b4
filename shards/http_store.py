"""Objects read over http, straight into the caller's memory, through whatever the network does meanwhile.

Buckets are read this way too: `object_store.py` only says where an object is and with which signature. Every transfer
goes on from the byte it had reached after a failure, and never mixes the bytes of two versions of an object."""

import functools
import http.client
import io
import itertools
import os
import random
import re
import socket
import ssl
import struct
import threading
import time
import urllib.request
from abc import abstractmethod
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import numpy as np

from shards.store import (
    MAX_VECTOR,
    Buffer,
    NoRangeError,
    Sink,
    StorageConfig,
    Store,
    TransferError,
    as_bytes,
    check_name,
    unfilled,
)


class RemoteStore(Store):
    """What http servers and buckets have in common: reading in pieces that may fail at any byte."""

    def __init__(self, url: str, options: StorageConfig) -> None:
        super().__init__(url.rstrip("/"), options)
        self.concurrency, self.request_bytes = options.concurrency, options.request_bytes
        self._versions: dict[str, Version] = {}
        self._parallelism = _Parallelism(options.concurrency)

    @property
    def useful_reads(self) -> int:
        return self._parallelism.reads

    @abstractmethod
    def open_body(self, name: str, offset: int, end: int | None, anew: bool) -> "Body":
        """One request for the bytes from `offset` to `end` (None: to the object's end), or to the object's end if
        that comes first. `anew` asks for fresh credentials. Raises Failure, and EOFError when `offset` lies beyond."""

    def read(self, name: str) -> bytes:
        pieces = itertools.repeat([memoryview(bytearray(1 << 16))])
        return b"".join(map(bytes, self._transfer(name, 0, None, pieces, Version(), expected=False)))

    def read_range(self, name: str, offset: int, buffers: Sequence[memoryview | np.ndarray]) -> None:
        views = [view for view in map(as_bytes, buffers) if view.nbytes]
        end = offset + sum(view.nbytes for view in views)
        version = self._versions.setdefault(name, Version())
        for _ in self._transfer(name, offset, end, iter([views]), version):
            pass
        self._parallelism.finished(end - offset)

    def stream(self, name: str, offset: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        return self._transfer(name, offset, None, itertools.repeat([memoryview(bytearray(chunk_bytes))]), Version())

    def _transfer(
        self,
        name: str,
        offset: int,
        end: int | None,
        pieces: Iterator[list[memoryview]],
        version: "Version",
        expected: bool = True,
    ) -> Iterator[memoryview]:
        """Fill the views of each piece in turn with the bytes from `offset` to `end`; yield its first when it is full.

        With `end` None the last may be yielded in part. `version` holds, or is given, what every piece must have been
        read from. An object that is `expected` is looked for more than once."""
        what = f"{self.url}/{check_name(name)}"
        patience = Patience(what, self.options)
        start, piece = offset, next(pieces)
        left: Sequence[memoryview] = piece
        while left:
            body = None
            try:
                body = self.open_body(name, offset, end, anew=patience.refused)
                version.check(body, what)
                while count := body.read_into(left):
                    patience.progress(count)
                    offset, left = offset + count, unfilled(left, count)
                    if not left:
                        yield piece[0]
                        left = piece = next(pieces, [])
                        if not left:
                            break
                if left and end is not None:
                    raise EOFError(
                        f"{what} ends at byte {offset}; wanted {end - start} bytes from {start}, got {offset - start}. "
                        "The object is shorter than its index says: run `shards verify` and make it again."
                    )
                break
            except OutOfRangeError as error:
                if end is not None or offset != (error.size or 0):
                    raise
                break  # all of it is here: it is empty, or an answer before this one had announced too much
            except Failure as failure:
                patience.wait(offset, failure, 1 if failure.error is FileNotFoundError and not expected else None)
            finally:
                if body:
                    body.close()
        if left and left[0].nbytes < piece[0].nbytes:
            yield piece[0][: piece[0].nbytes - left[0].nbytes]


class Body(Protocol):
    """The answer to one request: bytes from the offset that was asked for."""

    tag: str | None  # the server's name for this version of the object
    size: int | None  # of the whole object

    def read_into(self, views: Sequence[memoryview]) -> int:
        """Fill the views from their beginning on, at least one byte; 0 at the end of what was asked for. Raises
        Failure."""

    def close(self) -> None: ...


class Failure(Exception):
    """A request that did not bring all it should have, but may if it is made again."""

    def __init__(
        self, reason: str, retry_after: float = 0.0, error: type[OSError] = TransferError, attempts: int | None = None
    ) -> None:
        super().__init__(reason)
        self.retry_after, self.error, self.attempts = retry_after, error, attempts


class OutOfRangeError(EOFError):
    """A request for bytes behind the end of an object, which has `size`, if the server says so."""

    def __init__(self, what: str, offset: int, size: int | None = None) -> None:
        super().__init__(f"{what} has {'fewer' if size is None else size} bytes; wanted those from {offset} on.")
        self.size = size


@dataclass
class Version:
    """The version of an object that its first piece came from, and all others must; told by tag, or else by size."""

    tag: str | None = None
    size: int | None = None

    def check(self, body: Body, what: str) -> None:
        tagged = self.tag is not None and body.tag is not None
        mine, its = (self.tag, body.tag) if tagged else (self.size, body.size)
        if None not in (mine, its) and mine != its:
            raise TransferError(
                f"{what} was replaced while it was read: it was {self.tag} with {self.size} bytes and is "
                f"{body.tag} with {body.size}. Sealed shards never change; if this one was made again, start again."
            )
        self.tag, self.size = self.tag or body.tag, body.size if self.size is None else self.size


class RefusedError(TransferError, PermissionError):
    """A remote place that kept refusing: 401, 403."""


class AbsentError(TransferError, FileNotFoundError):
    """An object that a remote place kept saying not to have: 404, 410."""


_GIVEN_UP: dict[type[OSError], type[OSError]] = {PermissionError: RefusedError, FileNotFoundError: AbsentError}
_WAKE_BYTES = 1 << 18  # that wait in the kernel before it wakes the reader of a long answer
_PROGRESS_BYTES = 1 << 16  # what an attempt must bring to count as going on, and a connection in each stall_seconds


class Patience:
    """How often and how long one transfer is tried again: bounds on the attempts and seconds without progress."""

    def __init__(self, what: str, options: StorageConfig) -> None:
        self._what, self._options = what, options
        self._bytes = self._attempts = self._all_attempts = 0
        self._since = time.monotonic()
        self.refused = False

    def progress(self, count: int) -> None:
        self._bytes += count
        if self._bytes >= _PROGRESS_BYTES:
            self._bytes, self._attempts, self._since = 0, 0, time.monotonic()
            self.refused = False

    def wait(self, offset: int, failure: Failure, attempts: int | None = None) -> None:
        """Sleep before the next attempt, or raise the error that ends the transfer."""
        self._attempts += 1
        self._all_attempts += 1
        self.refused = failure.error is PermissionError
        pause = min(self._options.backoff_seconds * 2 ** (self._attempts - 1), 15.0)
        pause = max(pause * random.SystemRandom().uniform(0.5, 1.0), failure.retry_after)
        elapsed = time.monotonic() - self._since
        limit = min(filter(None, (attempts, failure.attempts, self._options.retry_attempts)))
        if self._attempts >= limit or elapsed + pause > self._options.retry_seconds:
            raise _GIVEN_UP.get(failure.error, failure.error)(
                f"{self._what}: gave up at byte {offset} after {self._all_attempts} attempts, the last "
                f"{self._attempts} without progress in {elapsed:.1f} s; last reason: {failure}"
            ) from None
        time.sleep(pause)


class _Parallelism:
    """Finds how many reads at once a place rewards: many where each waits long or comes slowly, few where not, since
    threads that wait for one another cost CPU. It tries twice as many, or a third fewer, goes on while that is right,
    and otherwise turns round and looks again after ever longer pauses."""

    WINDOW_SECONDS = 0.5
    MOST_PAUSES = 16

    def __init__(self, most: int) -> None:
        self._most = most
        self.reads = self._kept = min(most, 8)
        self._rate = 0.0  # bytes/s of `_kept` at once
        self._is_rising = True
        self._pauses, self._paused = 1, 0
        self._is_settling = True  # connections and memory are new
        self._bytes = self._count = 0
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def finished(self, num_bytes: int) -> None:
        """Note that a read has ended, and after some of them draw conclusions."""
        with self._lock:
            self._bytes, self._count = self._bytes + num_bytes, self._count + 1
            seconds = time.monotonic() - self._since
            if seconds > self.WINDOW_SECONDS and self._count >= 2 * self.reads:
                reads = self.reads
                if not self._is_settling:
                    self._adapt(self._bytes / seconds)
                self._is_settling = self.reads != reads
                self._since, self._bytes, self._count = time.monotonic(), 0, 0

    def _adapt(self, rate: float) -> None:
        """Keep more reads if they brought a tenth more bytes, fewer if they brought about as many."""
        if self.reads == self._kept:
            self._rate = rate
        elif rate > self._rate * (1.1 if self._is_rising else 0.97):
            self._kept, self._rate, self._pauses = self.reads, max(rate, self._rate), 0
        else:
            self.reads, self._is_rising = self._kept, not self._is_rising
            self._pauses, self._paused = min(2 * self._pauses + 1, self.MOST_PAUSES), 0
        if self._paused < self._pauses:
            self._paused += 1
            return
        more, fewer = min(self._most, 2 * self._kept), max(2, self._kept * 2 // 3)
        self._is_rising = fewer == self._kept or (self._is_rising and more > self._kept)
        self.reads = more if self._is_rising else fewer


class HttpStore(RemoteStore):
    """Objects below a URL of an http(s) server, read only."""

    def __init__(self, url: str, options: StorageConfig) -> None:
        super().__init__(url, options)
        self._client = HttpClient(options)
        parts = urlsplit(self.url)
        self._quoted_url = parts._replace(path=_quoted(parts.path)).geturl()

    def open_body(self, name: str, offset: int, end: int | None, anew: bool) -> "HttpBody":
        headers = {}
        if self.options.http_token_file:
            headers = {"Authorization": f"Bearer {_token(self.options.http_token_file)}"}
        return self._client.get(f"{self._quoted_url}/{quote(name)}", f"{self.url}/{name}", offset, end, headers)

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

    def writer(self, name: str) -> AbstractContextManager[Sink]:
        self._read_only()

    def create(self, name: str, data: Buffer) -> bool:
        self._read_only()

    def delete(self, name: str) -> None:
        self._read_only()

    def sweep(self, prefix: str = "") -> Sequence[str]:
        self._read_only()

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        raise io.UnsupportedOperation(
            f"{self.url}: http servers cannot be listed; list the folder or bucket behind it."
        )

    def _read_only(self) -> NoReturn:
        raise io.UnsupportedOperation(
            f"{self.url}: http servers are only read from; write to a folder or bucket and serve that."
        )


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
        self._options = options
        self._idle: dict[tuple[str, str], list[socket.socket]] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._redirects: dict[str, str] = {}

    def get(
        self, url: str, what: str, offset: int, end: int | None, authorization: dict[str, str] | None = None
    ) -> "HttpBody":
        """The answer to a GET of the bytes from `offset` to `end`, or to the object's end.

        `what` names the object in errors, because the URL may hold a signature. `authorization` goes to the server in
        the URL, never to those that it redirects to."""
        headers = {
            "Accept-Encoding": "identity",
            "User-Agent": "audiosep-shards",
            "Connection": "keep-alive",
            "Range": f"bytes={offset}-{'' if end is None else end - 1}",  # always, so that answers tell the whole size
        }
        try:
            head = self._follow(url, what, headers, authorization or {})
            if head.status in (200, 206):
                return HttpBody(head, what, offset, end, self._options)
            head.release(reuse=False)
            if head.status == 416:
                size = head.headers.get("content-range", "").rpartition("/")[2]
                raise OutOfRangeError(what, offset, int(size) if size.isdecimal() else None)
            raise _failure(head)
        except BaseException:
            self.forget_redirect(what)
            raise

    def _follow(self, url: str, what: str, headers: dict[str, str], authorization: dict[str, str]) -> "_Head":
        """The first answer that is no redirect. Where an object was found last is where it is looked for next."""
        target = self._redirects.get(what, url)
        for _ in range(1 + _MAX_REDIRECTS):
            parts = urlsplit(target)
            head = self._ask(parts, headers | (authorization if parts[:2] == urlsplit(url)[:2] else {}))
            if head.status not in (301, 302, 303, 307, 308):
                return head
            head.release(reuse=False)
            location = head.headers.get("location")
            if not location:
                raise Failure(
                    f"the server answered {head.reason}, no Location: for S3, is the region right?", attempts=3
                )
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
        lines = [
            f"GET {resource} HTTP/1.1",
            f"Host: {target.netloc}",
            *(f"{key}: {value}" for key, value in headers.items()),
        ]
        request = "\r\n".join([*lines, "", ""]).encode("latin-1")
        while True:
            kept = self._take(target)
            connection = None
            try:
                connection = kept or _connect(target, proxy, self._options)
                connection.sendall(request)
                return _Head(connection, self, target, self._options.stall_seconds)
            except ssl.SSLCertVerificationError as error:
                raise TransferError(
                    f"{target.scheme}://{target.netloc}: {error}. Set SSL_CERT_FILE to its CA."
                ) from None
            except (ValueError, http.client.InvalidURL) as error:
                raise ValueError(f"{target.scheme}://{target.netloc} cannot be connected to: {error}.") from None
            except (OSError, Failure, http.client.HTTPException) as error:
                if connection:
                    connection.close()
                if not kept or isinstance(error, TimeoutError):
                    raise error if isinstance(error, Failure) else Failure(f"{type(error).__name__}: {error}") from None

    def _take(self, target: SplitResult) -> socket.socket | None:
        with self._lock:
            if self._process != os.getpid():  # connections of the parent process, which goes on using them
                self._idle, self._process = {}, os.getpid()
            idle = self._idle.get((target.scheme, target.netloc))
            return idle.pop() if idle else None

    def keep(self, origin: tuple[str, str], connection: socket.socket) -> None:
        with self._lock:
            self._idle.setdefault(origin, []).append(connection)


class _Proxy(NamedTuple):
    host: str
    port: int
    headers: dict[str, str]  # with its password


def _connect(target: SplitResult, proxy: _Proxy | None, options: StorageConfig) -> socket.socket:
    """A connection to a URL's server, with TLS for https and through a proxy where the environment names one. Raises
    ValueError if the URL can be no server's."""
    if not target.hostname:
        raise ValueError("it names no server")
    host, port = (proxy.host, proxy.port) if proxy else (target.hostname, target.port)
    if target.scheme == "https":
        maker: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=options.stall_seconds, context=_tls()
        )
        if proxy:
            maker.set_tunnel(target.hostname, target.port or 443, proxy.headers)
    else:
        maker = http.client.HTTPConnection(host, port, timeout=options.stall_seconds)
    maker.connect()
    connection = maker.sock
    if target.scheme != "https":  # the kernel watches the time, so that one call can fill much memory
        connection.settimeout(None)
        seconds = struct.pack("ll", int(options.stall_seconds), int(options.stall_seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, seconds)
    return connection


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

    def __init__(
        self, connection: socket.socket, client: HttpClient, target: SplitResult, stall_seconds: float
    ) -> None:
        self.connection, self.client, self.target = connection, client, target
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

    def release(self, reuse: bool) -> None:
        if reuse and self.keeps_alive:
            self.client.keep((self.target.scheme, self.target.netloc), self.connection)
        else:
            self.connection.close()


def _failure(head: _Head) -> Failure:
    """What an answer that brings no bytes means for another attempt."""
    reason = f"the server answered {head.reason}"
    is_signed = bool(head.target.query)  # S3 answers 400 when the signing session has expired
    if head.status in (401, 403) or (head.status == 400 and is_signed):  # once more with fresh credentials
        return Failure(reason, error=PermissionError, attempts=3)
    if head.status in (404, 410):
        return Failure(reason, error=FileNotFoundError, attempts=3)
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

    def __init__(self, head: _Head, what: str, offset: int, end: int | None, options: StorageConfig) -> None:
        self._head, self._what, self._stall_seconds = head, what, options.stall_seconds
        self._window_start, self._window_bytes = time.monotonic(), 0
        self._rest = memoryview(head.rest)
        self._skip = 0
        try:
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
            self._reusable = head.status == 206 or self._remaining + self._skip == length
        except BaseException:
            head.release(reuse=False)
            raise

    def read_into(self, views: Sequence[memoryview]) -> int:
        while self._skip:
            self._skip -= self._receive([memoryview(bytearray(min(self._skip, _PROGRESS_BYTES)))])
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
            if self._window_bytes < _PROGRESS_BYTES:
                raise Failure(f"only {self._window_bytes} bytes came in {now - self._window_start:.1f} s")
            self._window_start, self._window_bytes = now, 0
        return count

    def close(self) -> None:
        """Give the connection back if all was read from it, close it otherwise."""
        is_done = not self._remaining and not self._skip
        if not is_done:
            self._head.client.forget_redirect(self._what)
        self._head.release(reuse=self._reusable and is_done)


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
