"""Buckets: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

Objects are written, listed and deleted by the `obstore` client. They are read by presigned URLs through our own http
code where such a URL is computed locally (s3), since that fills the caller's memory without another copy, and through
`obstore` elsewhere."""

import itertools
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
import obstore.store
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

from shards.http_store import HttpClient
from shards.remote_store import AbsentError, Body, Failure, OutOfRangeError, Patience, RefusedError, RemoteStore
from shards.store import Buffer, Sink, StorageConfig, TransferError, UploadError, as_bytes, check_name

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

log = logging.getLogger(__name__)

T = TypeVar("T")
SIGNED_SECONDS = 3600
PARTS_AT_ONCE = 2  # of one upload; several uploads run beside one another
SMALL_BYTES = 1 << 16  # that any connection sends in stall_seconds


class ObjectStore(RemoteStore):
    """A prefix of a bucket. An object appears under its name whole, when its upload completes."""

    def __init__(self, url: str, options: StorageConfig) -> None:
        super().__init__(url, options)
        parts = urlsplit(self.url)
        self._scheme, self._bucket, prefix = parts.scheme, parts.netloc, unquote(parts.path).strip("/")
        self._root = prefix and f"{prefix}/"  # what our keys begin with
        self._signs = parts.scheme == "s3" and options.signed_urls and not options.anonymous
        self._http = HttpClient(options)
        self._clients: dict[bool, Client] = {}  # for requests with large bodies, and for all others
        self._urls: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def open_body(self, name: str, offset: int, end: int | None, anew: bool) -> Body:
        if anew:
            self._clients = {}  # the next ones read the environment and the profiles again
        if self._signs:
            return self._http.get(self._signed(name, anew), f"{self.url}/{name}", offset, end)
        client = self._connect()
        try:
            return _ClientBody(client, name, offset, end)
        except (BaseError, OSError) as error:
            if "416 Range Not Satisfiable" in str(error):
                raise OutOfRangeError(f"{self.url}/{name}", offset) from None
            raise _failure(error) from None

    def _signed(self, name: str, anew: bool) -> str:
        """A URL that reads an object: computed here, without a request, and kept for half of its life."""
        url, expires = self._urls.get(name, ("", 0.0))
        if anew or time.monotonic() > expires:
            url = self._ask(name, lambda client: _sign(client, name))
            if len(self._urls) >= 10_000:
                self._urls.clear()
            self._urls[name] = url, time.monotonic() + SIGNED_SECONDS / 2
        return url

    def size(self, name: str) -> int | None:
        try:
            return self._ask(name, lambda client: obstore.head(client, name), expected=False)["size"]
        except FileNotFoundError:
            return None

    @contextmanager
    def writer(self, name: str) -> Iterator[Sink]:
        check_name(name)
        sink = _PartSink(self.options.part_bytes)
        with ThreadPoolExecutor(1) as thread:
            upload = thread.submit(self._upload, name, sink.parts())
            sink.feeds(upload)
            try:
                yield sink
                sink.finish()
            except BaseException as error:
                sink.abort(error)
                raise
        upload.result()

    def _upload(self, name: str, parts: Iterator[bytearray]) -> None:
        """Put an object of one part like any small one; a larger one in parts, which are gone when it fails."""
        first = list(itertools.islice(parts, 2))
        if len(first) < 2:
            self.write(name, first[0] if first else b"")
            return
        client = self._connect(uploads=True)
        try:
            self._put(client, name, itertools.chain(first, parts), in_parts=True)
        except (BaseError, OSError) as error:
            self._clients = {}
            raise UploadError(f"{self.url}/{name}: the upload failed and has to begin anew: {_reason(error)}") from None

    def write(self, name: str, data: Buffer) -> None:
        view = as_bytes(data)
        in_parts = view.nbytes > self.options.part_bytes
        self._ask(check_name(name), lambda client: self._put(client, name, view, in_parts), view.nbytes)

    def create(self, name: str, data: Buffer) -> bool:
        view, attempts = as_bytes(data), 0

        def put(client: "Client") -> None:
            nonlocal attempts
            attempts += 1
            self._put(client, name, view, mode="create")

        try:
            self._ask(check_name(name), put)
        except FileExistsError:  # perhaps by an earlier attempt of ours whose answer was lost
            return attempts > 1 and self.read(name) == view
        return True

    def _put(self, client: "Client", name: str, data: Any, in_parts: bool = False, mode: Any = None) -> None:
        part, at_once = self.options.part_bytes, PARTS_AT_ONCE
        obstore.put(client, name, data, mode=mode, use_multipart=in_parts, chunk_size=part, max_concurrency=at_once)
        self._versions.pop(name, None)  # what we replaced ourselves may be read anew

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        folder = prefix[: prefix.rfind("/") + 1].rstrip("/")
        after = prefix.removeprefix(folder).strip("/") and prefix
        found = self._ask(prefix, lambda client: self._pages(client, folder, after))
        if after and (size := self.size(prefix)) is not None:
            yield prefix, size
        yield from found

    def _pages(self, client: "Client", folder: str, prefix: str) -> Sequence[tuple[str, int]]:
        """Names below `folder` that come after `prefix` and start with it, and their sizes."""
        found = []
        try:
            for page in obstore.list(client, folder or None, offset=prefix or None, chunk_size=1000):
                found += [(each["path"], each["size"]) for each in page if each["path"].startswith(prefix)]
                if prefix and page[-1]["path"] > prefix and not page[-1]["path"].startswith(prefix):
                    break
        except BaseError as error:
            if "object with invalid path" not in str(error):
                raise
            found = [*self._list_by_boto3(prefix or (folder and f"{folder}/"), _reason(error))]
        return sorted(each for each in found if each[0] not in ("", prefix))  # "" is what some tools make of a folder

    def _list_by_boto3(self, prefix: str, reason: str) -> Sequence[tuple[str, int]]:
        """Names and sizes where others put keys such as a//b, which are no paths and none of ours, and at which obstore
        gives up for the given reason."""
        boto3 = self._boto3()
        if boto3 is None:
            hint = ", or `pip install boto3`, which can pass over it" if self._scheme == "s3" else ""
            raise ValueError(f"{self.url} cannot be listed: {reason}. Delete that object{hint}.")
        pages = boto3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._root + prefix)
        try:
            found = [each for page in pages for each in page.get("Contents", ())]
        except Exception as error:  # botocore's have no base of their own in common
            raise TransferError(str(error)) from None
        names = [(each["Key"].removeprefix(self._root), each["Size"]) for each in found]
        return [(name, size) for name, size in names if not {"", ".", ".."} & set(name.split("/"))]

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._ask(check_name(name), lambda client: obstore.delete(client, name), expected=False)

    def sweep(self, prefix: str = "", rewritten: Container[str] = ()) -> Sequence[str]:
        """Abort multipart uploads to s3 below `prefix`: those to `rewritten` names, and the others of such an age that
        their writers can't be alive. On gs a lifecycle rule does this, Azure drops uncommitted blocks after a week."""
        swept = list[str]()
        if self._scheme != "s3":
            return swept
        began_before = datetime.now(UTC) - timedelta(hours=self.options.stale_temporary_hours)
        try:
            client = self._boto3()
            if client is None:
                log.info("Unfinished uploads to %s are left alone: that needs `pip install boto3`.", self.url)
                return swept
            paginator, place = client.get_paginator("list_multipart_uploads"), {"Bucket": self._bucket}
            pages = paginator.paginate(**place, Prefix=self._root + prefix)
            for upload in itertools.chain.from_iterable(page.get("Uploads", ()) for page in pages):
                name = upload["Key"].removeprefix(self._root)
                if name in rewritten or upload["Initiated"] < began_before:
                    client.abort_multipart_upload(**place, Key=upload["Key"], UploadId=upload["UploadId"])
                    swept.append(name)
        except Exception as error:  # botocore's have no base of their own in common
            log.warning("Unfinished uploads to %s cannot be swept, which costs only money: %s", self.url, error)
        return swept

    def _boto3(self) -> Any:
        """A client of boto3, which sees some of s3 that obstore does not; None where it isn't installed."""
        try:
            import boto3
        except ModuleNotFoundError:
            return None
        return boto3.client("s3", endpoint_url=self.options.endpoint, region_name=self.options.region)

    def _ask(self, name: str, request: Callable[["Client"], T], upload_bytes: int = 0, expected: bool = True) -> T:
        """What a request brings, made again as reads are; its errors are named by our URL and free of secrets.

        An object that is put in parts is put three times at most, however long that takes: parts that came through are
        progress that only the client sees."""
        options = self.options
        if upload_bytes > options.part_bytes:
            options = replace(options, retry_seconds=math.inf, retry_attempts=min(3, options.retry_attempts))
        patience = Patience(f"{self.url}/{name}", options, expected)
        while True:
            client = self._connect(uploads=upload_bytes > SMALL_BYTES)
            try:
                return request(client)
            except (BaseError, OSError) as error:
                failure = _failure(error)
            if failure.error is RefusedError:
                self._clients = {}  # the next ones read the environment and the profiles again
            patience.wait(0, failure)

    def _connect(self, uploads: bool = False) -> "Client":
        """The client of this process for large bodies or all else, made when it is first needed."""
        _PROCESSES.add(os.getpid())
        if len(_PROCESSES) > 1:
            raise RuntimeError(
                f"{self.url}: buckets were already used before this process was forked, and the client would hang in "
                "it. Start processes with the spawn or forkserver method, or use threads."
            )
        with self._lock:
            clients = self._clients
            if uploads not in clients:
                try:
                    clients[uploads] = _make_client(self._scheme, self.url, self.options, uploads)
                except ValueError:
                    raise
                except Exception as error:  # obstore's and boto3's have no base of their own in common
                    raise ValueError(
                        f"{self.url}: the storage options or the environment cannot be right: {_reason(error)}. "
                        "docs/object-storage.md says what to set."
                    ) from None
            return clients[uploads]


_PROCESSES: set[int] = set()  # that used obstore, as known here: a forked child inherits its parent's


def _sign(client: "Client", name: str) -> str:
    assert isinstance(client, obstore.store.S3Store)
    return obstore.sign(client, "GET", name, timedelta(seconds=SIGNED_SECONDS))


def _make_client(scheme: str, url: str, options: StorageConfig, uploads: bool) -> "Client":
    """A client that is quick to notice silence, or one for `uploads`: its clocks run while a body is sent, too, so they
    must allow for all the parts that share a slow link. It sends each part again by itself; else we do.

    Raises ValueError for settings that cannot be right."""
    config: dict[str, Any] = {"endpoint": options.endpoint, "skip_signature": options.anonymous or None}
    provider = None
    _check_endpoints(url, options)
    if scheme == "s3":
        config["region"] = options.region
        if not options.anonymous and _has_profile():
            try:
                from obstore.auth.boto3 import Boto3CredentialProvider
            except ModuleNotFoundError:
                raise ValueError(f"{url}: the AWS profile or credentials file needs `pip install boto3`.") from None
            provider = Boto3CredentialProvider()
    second = timedelta(seconds=1)
    upload_seconds = options.stall_seconds * (1 + PARTS_AT_ONCE * options.part_bytes / (1 << 20))
    if uploads:
        timeouts = {"timeout": upload_seconds * second}
        attempts, seconds = options.retry_attempts, options.retry_seconds + upload_seconds
    else:
        timeouts = {"timeout": options.retry_seconds * second, "read_timeout": options.stall_seconds * second}
        attempts, seconds = 1, options.retry_seconds
    return obstore.store.from_url(  # type: ignore[call-overload]
        url,
        config={key: value for key, value in config.items() if value is not None},
        client_options={"allow_http": True, **timeouts},  # where the endpoint says so
        retry_config={
            "max_retries": attempts - 1,
            "retry_timeout": seconds * second,
            "backoff": {"init_backoff": options.backoff_seconds * second, "max_backoff": 15 * second, "base": 2},
        },
        **({"credential_provider": provider} if provider else {}),
    )


def _check_endpoints(url: str, options: StorageConfig) -> None:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    given = {"storage.endpoint": options.endpoint} | {name: os.environ.get(name) for name in names}
    for name, endpoint in given.items():
        parts = urlsplit(endpoint or "http://none")
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(
                f"{url}: {name} is no URL such as http://127.0.0.1:9000, without user name and password; correct it."
            )


def _has_profile() -> bool:
    """Whether AWS credentials stand in a profile, which obstore leaves to boto3, and not in the environment."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return False
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    return "AWS_PROFILE" in os.environ or file.exists()


class _ClientBody:
    """The answer to a request that obstore made."""

    def __init__(self, client: "Client", name: str, offset: int, end: int | None) -> None:
        wanted: Any = {"offset": offset} if end is None else (offset, end)
        result = obstore.get(client, name, options={"range": wanted} if offset or end is not None else {})
        self.tag = result.meta["e_tag"]
        self.size: int | None = result.meta["size"]
        self._chunks: Iterator[Any] = iter(result.stream(min_chunk_size=1 << 18))
        self._rest = memoryview(b"")

    def read_into(self, views: Sequence[memoryview]) -> int:
        view = views[0]
        try:
            while not self._rest:
                self._rest = memoryview(next(self._chunks))
        except StopIteration:
            return 0
        except (BaseError, OSError) as error:
            raise _failure(error) from None
        count = min(len(self._rest), len(view))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._chunks = iter(())


def _failure(error: Exception) -> Failure:
    """What an obstore error means for another attempt."""
    text, reason = _text(error), _reason(error)
    if isinstance(error, AlreadyExistsError):
        return Failure(reason, error=FileExistsError, attempts=1)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(text):
        return Failure(reason, error=RefusedError, attempts=3)
    if isinstance(error, FileNotFoundError) or "404 Not Found" in text:  # as lists and deletes say it
        return Failure(reason, error=AbsentError, attempts=3)
    is_final = re.search(r"status code: 4(?!08|09|25|29)|redirect", str(error))  # nothing to do with the network
    return Failure(reason, attempts=3 if is_final else None)


_NO_CREDENTIALS = re.compile(r"//(169\.254\.169\.254|metadata\.google\.internal)")
_EXPIRED = re.compile("<Code>(ExpiredToken|TokenRefreshRequired|InvalidToken)|400 Bad Request[: ]*$")  # bare to HEAD
_REFUSED = re.compile(f"403 Forbidden|{_EXPIRED.pattern}|{_NO_CREDENTIALS.pattern}")


def _text(error: Exception) -> str:
    """An obstore error in one line, without its debugging part."""
    return " ".join(str(error).partition("\n\nDebug source")[0].split())


def _reason(error: Exception) -> str:
    """An obstore error in one line, without what may hold secrets: its debugging part, the queries and passwords of
    URLs, and all of an XML answer but code and message."""
    text, *answer = re.split(r"<\?xml|<Error", _text(error), maxsplit=1)
    if answer:
        text += ": ".join(re.findall(r"<(?:Code|Message)>([^<]*)", answer[0]))
    text = re.sub(r"://[^\s/@]*@", "://", text)
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?...", text)[:400].rstrip(": ")
    if _NO_CREDENTIALS.search(text):
        return (
            "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT or "
            "AZURE_STORAGE_ACCOUNT_KEY, or storage.anonymous for a public bucket. The machine's own role, asked last, "
            f"gave: {text}"
        )
    return text


class _PartSink:
    """Collects what is written into parts that a thread uploads, at most two ahead of it."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._part = bytearray()
        self._parts: queue.SimpleQueue[bytearray | BaseException | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(2)

    def feeds(self, upload: "Future[None]") -> None:
        """Name the upload that takes the parts; once it has failed, `write` raises its error."""
        self._upload = upload
        upload.add_done_callback(lambda _: self._free.release())

    def write(self, *buffers: Buffer) -> None:
        for view in map(as_bytes, buffers):
            while view:
                count = min(len(view), self._part_bytes - len(self._part))
                self._part += view[:count]
                view = view[count:]
                if len(self._part) == self._part_bytes:
                    self._hand_over()

    def _hand_over(self) -> None:
        self._free.acquire()
        if self._upload.done():
            self._free.release()  # for whoever writes on
            self._upload.result()
        self._parts.put(self._part)
        self._part = bytearray()

    def finish(self) -> None:
        if self._part:
            self._hand_over()
        self._parts.put(None)

    def abort(self, error: BaseException) -> None:
        self._parts.put(error)

    def parts(self) -> Iterator[bytearray]:
        """The parts as they come; raises what `abort` was given, upon which the upload is aborted."""
        while (part := self._parts.get()) is not None:
            if isinstance(part, BaseException):
                raise part
            yield part
            self._free.release()
