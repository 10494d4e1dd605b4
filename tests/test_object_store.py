"""Buckets and http servers, on real ones: the same promises as local folders, kept through failures."""

import multiprocessing
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import serving
from lossy_proxy import FAULTS, LossyProxy
from servers import ACCESS_KEY, BUCKET, SECRET_KEY, HttpServer, S3Server, free_ports

from shards.storage import open_store
from shards.store import NoRangeError, StorageConfig, Store, TransferError, UploadError


@pytest.fixture(params=["presigned", "client", "azure"])
def store(request: pytest.FixtureRequest, s3_server: S3Server, tmp_path: Path) -> Store:
    """A fresh prefix of a bucket: of s3, read by presigned URLs or by obstore, and of Azure where Azurite is."""
    prefix = f"{tmp_path.name} {request.param}"
    if request.param == "azure":
        return open_store(f"az://{BUCKET}/{prefix}", request.getfixturevalue("azure_server").options)
    options = replace(s3_server.options, signed_urls=request.param == "presigned")
    return open_store(f"s3://{BUCKET}/{prefix}", options)


def test_objects_come_back_whole_and_absent_ones_are_named(store: Store) -> None:
    content = np.random.default_rng(0).bytes(200_000)
    store.write("0001/a b.tar", b"old")
    store.write("0001/a b.tar", content)
    store.write("empty", b"")
    assert store.read("0001/a b.tar") == content
    assert store.read("empty") == b""
    assert [store.size(name) for name in ("0001/a b.tar", "empty", "absent")] == [200_000, 0, None]
    assert b"".join(map(bytes, store.stream("0001/a b.tar", 1000, chunk_bytes=4096))) == content[1000:]
    assert list(store.list()) == [("0001/a b.tar", 200_000), ("empty", 0)]
    assert list(store.list("0001/a")) == [("0001/a b.tar", 200_000)]
    assert list(store.list("00")) == [("0001/a b.tar", 200_000)]
    assert list(store.list("b")) == []
    for read in (
        store.read,
        lambda name: store.read_range(name, 0, [np.empty(1)]),
        lambda name: list(store.stream(name)),
    ):
        with pytest.raises(FileNotFoundError, match=rf"{store.url}/absent"):
            read("absent")
    store.delete("empty")
    store.delete("empty")
    assert store.size("empty") is None
    assert pickle.loads(pickle.dumps(store)).read("0001/a b.tar") == content


def test_ranges_scatter_into_buffers_of_any_type_from_many_threads(store: Store) -> None:
    content = np.random.default_rng(1).integers(0, 1 << 16, 500_000, dtype=np.uint16)
    store.write("rows", content)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            start = int(rng.integers(400_000))
            rows = [np.empty(int(rng.integers(5000)), np.float16) for _ in range(4)]
            store.read_range("rows", 2 * start, [memoryview(bytearray(2)), *rows])
            total = sum(row.size for row in rows)
            back = np.concatenate([row.view(np.uint16) for row in rows])
            np.testing.assert_array_equal(back, content[start + 1 : start + 1 + total])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    with pytest.raises(EOFError, match="ends at byte 1000000; wanted 20 bytes from 999990, got 10"):
        store.read_range("rows", 999_990, [np.empty(20, np.uint8)])
    with pytest.raises(EOFError, match="wanted those from 2000000 on"):
        store.read_range("rows", 2_000_000, [np.empty(20, np.uint8)])


def test_large_objects_commit_on_a_clean_end_only_and_leave_no_upload(store: Store, s3_server: S3Server) -> None:
    rng = np.random.default_rng(2)
    pieces = [rng.bytes(3 << 20) for _ in range(7)]
    store.write("shard.tar", b"old")
    small_parts = open_store(store.url, replace(store.options, part_bytes=5 << 20))
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), small_parts.writer("shard.tar") as sink:
            raise sink.write(*pieces) or error
        assert store.read("shard.tar") == b"old"
    with small_parts.writer("shard.tar") as sink:
        sink.write(*pieces[:3])
        for piece in pieces[3:]:
            sink.write(np.frombuffer(piece, np.float16))
    with store.writer("nothing") as sink:
        pass
    assert store.read("shard.tar") == b"".join(pieces)
    assert store.read("nothing") == b""
    assert s3_server.uploads() == []


def test_of_many_creators_one_wins(store: Store) -> None:
    barrier = threading.Barrier(8)

    def create(index: int) -> bool:
        barrier.wait()
        return store.create("spec.json", b"%d" % index)

    with ThreadPoolExecutor(8) as pool:
        outcomes = pool.map(create, range(8))
    assert [b"%d" % index for index, won in enumerate(outcomes) if won] == [store.read("spec.json")]


def test_a_replaced_object_is_an_error_for_the_reader_and_not_for_who_replaced_it(store: Store) -> None:
    reader, row = open_store(store.url, store.options), np.empty(4, np.uint8)
    store.write("a", b"0000")
    for each in (store, reader):
        each.read_range("a", 0, [row])
    store.write("a", b"1111")
    store.read_range("a", 0, [row])
    assert row.tobytes() == b"1111"
    with pytest.raises(TransferError, match=f"{store.url}/a was replaced while it was read"):
        reader.read_range("a", 0, [row])
    assert reader.read("a") == b"1111"


WRITER = """
import sys, time
from shards.storage import open_store
from shards.store import StorageConfig
options = StorageConfig(endpoint=sys.argv[2], region="us-east-1", part_bytes=5 << 20)
with open_store(sys.argv[1], options).writer("shard.tar") as sink:
    for _ in range(5):
        sink.write(bytes(5 << 20))
    print("writing", flush=True)
    time.sleep(60)
"""


def test_killed_writers_leave_nothing_but_uploads_that_sweeping_aborts(s3_server: S3Server, tmp_path: Path) -> None:
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}", s3_server.options)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store.url, s3_server.endpoint], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert store.size("shard.tar") is None
    assert s3_server.uploads() == [f"{tmp_path.name}/shard.tar"]
    assert store.sweep() == []  # it could be a live writer's
    impatient = open_store(store.url, replace(s3_server.options, stale_temporary_hours=1e-9))
    assert impatient.sweep("other") == []
    assert impatient.sweep() == ["shard.tar"]
    assert s3_server.uploads() == []


def test_sweeping_needs_neither_boto3_nor_permission(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("boto3", "AWS_SECRET_ACCESS_KEY"):
        with monkeypatch.context() as patch:
            if name == "boto3":
                patch.setitem(sys.modules, "boto3", None)
            else:
                patch.setenv(name, "wrong")
            assert open_store(f"s3://{BUCKET}/swept", s3_server.options).sweep() == []


def in_a_fork(store: Store, name: str, results: Any) -> None:
    try:
        results.put(store.read(name))
    except RuntimeError as error:
        results.put(str(error))


def test_a_fork_after_use_is_refused_for_buckets_and_harmless_for_http(
    store: Store, http_server: HttpServer, tmp_path: Path
) -> None:
    store.write("a", b"1")
    (http_server.files / "a").write_bytes(b"1")
    web = open_store(http_server.url)
    assert web.read("a") == b"1"
    for parent, expected in ((store, "before this process was forked"), (web, b"1")):
        for method in ("fork", "spawn"):
            context = multiprocessing.get_context(method)
            results = context.SimpleQueue()
            child = context.Process(target=in_a_fork, args=(parent, "a", results))
            child.start()
            result = results.get()
            child.join()
            assert (expected if method == "fork" else b"1") in result
    assert web.read("a") == b"1"


def test_http_reads_by_range_or_in_sequence_and_never_writes(http_server: HttpServer) -> None:
    content = np.random.default_rng(3).bytes(300_000)
    (http_server.files / "set").mkdir()
    (http_server.files / "set" / "a b.tar").write_bytes(content)
    (http_server.files / "set" / "empty").write_bytes(b"")
    row = np.empty(1000, np.uint8)
    for url in (f"{http_server.url}/set", f"{http_server.url}/plain/set"):
        web = open_store(url)
        assert web.read("a b.tar") == content
        assert [web.size(name) for name in ("a b.tar", "empty", "absent")] == [300_000, 0, None]
        assert b"".join(map(bytes, web.stream("a b.tar", 7, chunk_bytes=1 << 15))) == content[7:]
    open_store(f"{http_server.url}/set").read_range("a b.tar", 250_000, [row])
    assert row.tobytes() == content[250_000:251_000]
    with pytest.raises(OSError, match=r"after 3 attempts.* the server ignores Range"):
        open_store(f"{http_server.url}/plain/set").read_range("a b.tar", 5, [row])
    for write in (
        lambda: web.write("x", b""),
        lambda: web.create("x", b""),
        lambda: web.delete("x"),
        lambda: web.sweep(),
        lambda: web.list(),
    ):
        with pytest.raises(OSError, match=r"only read from|cannot be listed"):
            write()


def test_credentials_appear_in_no_error_log_pickle_or_name(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret-key")
    impatient = replace(s3_server.options, retry_attempts=2, backoff_seconds=0.01)
    seen = []
    for options in (impatient, replace(impatient, signed_urls=False)):
        store = open_store(f"s3://{BUCKET}/private", options)
        actions = [
            (store.read, "a"),
            (store.size, "a"),
            (store.write, "a", b"1"),
            (store.create, "a", b"1"),
            (list, store.list()),
            (store.read_range, "a", 0, [np.empty(1)]),
        ]
        for action, *arguments in actions:
            with pytest.raises(PermissionError, match="s3://bucket/private") as caught:
                action(*arguments)
            seen += traceback.format_exception(caught.value)
        seen += [repr(store), store.url, repr(pickle.dumps(store))]
    for text in (*seen, caplog.text):
        assert "a-wrong-secret-key" not in text
        assert ACCESS_KEY not in text
        assert "Signature" not in text.replace("SignatureDoesNotMatch", "").replace("calculated signature", "")


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://user:secret@host/x", None),
        ("https://host/x?token=secret", None),
        ("s3://key:secret@bucket/x", None),
        ("s3://bucket/x", "http://key:secret@host"),
    ],
)
def test_urls_with_credentials_are_refused_without_repeating_them(
    s3_server: S3Server, url: str, endpoint: str | None
) -> None:
    with pytest.raises(ValueError, match="holds a user name, password or query") as caught:
        open_store(url, replace(s3_server.options, endpoint=endpoint))
    assert "secret" not in str(caught.value)


def test_profiles_are_read_where_the_environment_has_no_keys(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}", s3_server.options)
    store.write("a", b"1")
    assert store.read("a") == b"1"


HASTY = {"stall_seconds": 0.25, "backoff_seconds": 0.001, "retry_seconds": 20.0}  # so that a test takes seconds
DETECTABLE = tuple(fault for fault in FAULTS if fault != "bytes")  # by a store; flipped bits are the reader's to find


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(kind, fault) for kind in ("http", "presigned") for fault in DETECTABLE]
    + [("client", fault) for fault in ("cut", "status", "stall")],
)
def test_one_answer_in_four_with_each_fault(
    s3_server: S3Server, http_server: HttpServer, tmp_path: Path, kind: str, fault: str
) -> None:
    """Every read is exact; three refusals in a row alone may end one, and the first 404 for a whole object."""
    content = np.random.default_rng(4).bytes(4_000_000)
    server = http_server if kind == "http" else s3_server
    server.target("set").write("faulty", content)
    with LossyProxy(server.port, [fault], rate=0.25, seed=5) as proxy:
        store = server.source("set", proxy.url, signed_urls=kind == "presigned", **HASTY)
        rng, refusals = np.random.default_rng(6), []
        for turn in range(15):
            start, row = int(rng.integers(2_000_000)), np.zeros((200_000, 2_000_000)[turn % 2], np.uint8)
            try:
                if turn % 5 == 4:  # whatever length was announced, what came is no other than the object
                    whole = store.read("faulty")
                    assert content.startswith(whole)
                    assert len(whole) == len(content) or fault == "length"
                    continue
                store.read_range("faulty", start, [row])
                assert row.tobytes() == content[start : start + len(row)]
            except (PermissionError, FileNotFoundError, NoRangeError) as error:
                refusals.append(str(error))
        assert len(refusals) <= 3 * (fault in ("refused", "no-range"))
        for message in refusals:
            assert re.search(
                rf"{store.url}/faulty: gave up at byte \d+ after [13] attempts.*(40[34]|ignores Range)", message
            )
        assert proxy.counts[fault] > 0


def test_a_server_that_stays_broken_is_an_error_with_place_attempts_and_reason(
    http_server: HttpServer, tmp_path: Path
) -> None:
    (http_server.files / "faulty").write_bytes(bytes(400_000))
    row = np.empty(200_000, np.uint8)
    for fault, reason in (
        ("status", "the server answered (500|503|429)"),
        ("stall", "within stall_seconds|no answer|bytes came"),
    ):
        with LossyProxy(http_server.port, [fault], rate=1.0) as proxy:
            store = open_store(proxy.url, replace(http_server.options, **(HASTY | {"retry_attempts": 4})))
            with pytest.raises(TransferError, match=rf"{proxy.url}/faulty: gave up at byte \d+ after \d+ .*({reason})"):
                store.read_range("faulty", 0, [row])
    closed = open_store(f"http://127.0.0.1:{free_ports(1)[0]}", replace(http_server.options, **HASTY, retry_attempts=3))
    with pytest.raises(TransferError, match=r"gave up at byte 0 after 3 attempts.*refused"):
        closed.read_range("faulty", 0, [row])
    begun = time.monotonic()
    patient = replace(http_server.options, **(HASTY | {"retry_attempts": 10_000, "retry_seconds": 1.0}))
    with pytest.raises(TransferError, match="gave up at byte 0"):
        open_store(closed.url, patient).read_range("faulty", 0, [row])
    assert 0.2 < time.monotonic() - begun < 3


def test_a_server_restarted_in_the_middle_goes_unnoticed(tmp_path: Path) -> None:
    server = HttpServer(tmp_path)
    server.start()
    content = np.random.default_rng(7).bytes(2_000_000)
    (server.files / "a").write_bytes(content)
    store, row = open_store(server.url, StorageConfig(backoff_seconds=0.05)), np.empty(1_000_000, np.uint8)
    pieces = store.stream("a", chunk_bytes=500_000)
    received = [bytes(next(pieces))]
    store.read_range("a", 7, [row])
    server.kill()
    restart = threading.Timer(0.5, server.start)
    restart.start()
    store.read_range("a", 1_000_000, [row])
    assert row.tobytes() == content[1_000_000:]
    assert b"".join([*received, *map(bytes, pieces)]) == content
    restart.join()
    server.stop()


class Planned(LossyProxy):
    """Breaks the answers that it is told to: the fault of each in turn, and where it strikes."""

    plan: list[tuple[str | None, float]]

    def draw(self) -> tuple[str | None, float]:
        return self.plan.pop(0) if self.plan else (None, 0.0)


@pytest.mark.parametrize("fault", ["cut", "stall", "status", "refused", "length"])
def test_every_request_is_made_again_after_one_broken_answer(s3_server: S3Server, fault: str) -> None:
    """Those that write, too; an upload in parts at each of its requests."""
    content = np.random.default_rng(8).bytes(6 << 20)
    direct = open_store(f"s3://{BUCKET}/again-{fault}", s3_server.options)
    direct.write("there", b"123456")

    def large(store: Store) -> None:
        store.write("large", content)
        assert direct.read("large") == content

    requests: list[tuple[Any, Any, int]] = [
        (lambda store: store.write("x", b"1"), None, 0),
        (lambda store: store.create(f"new-{where}", b"1"), True, 0),
        (lambda store: store.create("there", b"1"), False, 0),
        (lambda store: list(store.list("th")), [("there", 6)], 0),
        (lambda store: store.delete("x"), None, 0),
        *((large, None, skipped) for skipped in range(4)),
    ]
    if fault not in ("length", "refused"):  # the length is all that it asks for, and "not there" is believed
        requests.append((lambda store: store.size("there"), 6, 0))
    for where in (0.3, 0.8) if fault == "refused" else (0.8,):
        for request, expected, skipped in requests:
            with Planned(s3_server.port) as proxy:
                proxy.plan = [(None, 0.0)] * skipped + [(fault, where)]
                hasty = replace(s3_server.options, endpoint=proxy.url, part_bytes=5 << 20, **HASTY)
                assert request(open_store(direct.url, hasty)) == expected
                assert proxy.plan == []
    open_store(direct.url, replace(s3_server.options, stale_temporary_hours=1e-9)).sweep()


def test_uploads_take_the_time_that_a_slow_line_needs(s3_server: S3Server) -> None:
    """Each part needs far longer than stall_seconds."""
    content = np.random.default_rng(9).bytes(12 << 20)
    with LossyProxy(s3_server.port, upload_rate=8e6) as proxy:
        options = replace(s3_server.options, endpoint=proxy.url, part_bytes=5 << 20, **HASTY, retry_attempts=3)
        store = open_store(f"s3://{BUCKET}/slow", options)
        with store.writer("parts") as sink:
            sink.write(content)
        store.write("one", content[: 4 << 20])
    direct = open_store(store.url, s3_server.options)
    assert direct.read("parts") == content
    assert direct.read("one") == content[: 4 << 20]


def test_a_store_that_only_writes_takes_up_new_credentials(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"s3://{BUCKET}/rotated", replace(s3_server.options, **HASTY))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "old")
        with pytest.raises(PermissionError, match=r"s3://bucket/rotated/a: gave up .* after 3 attempts.*403"):
            store.write("a", b"1")
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_an_upload_in_parts_that_fails_says_that_it_has_to_begin_anew(s3_server: S3Server) -> None:
    with Planned(s3_server.port) as proxy:
        proxy.plan = [(None, 0.0), ("refused", 0.2)]
        options = replace(s3_server.options, endpoint=proxy.url, part_bytes=5 << 20, **HASTY)
        store = open_store(f"s3://{BUCKET}/anew", options)
        with (
            pytest.raises(UploadError, match=r"s3://bucket/anew/a: the upload failed and has to begin anew.*403"),
            store.writer("a") as sink,
        ):
            sink.write(bytes(12 << 20))
        assert store.size("a") is None


EXPIRED = b"""<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The token has expired.</Message>
<Token-0>a-secret</Token-0></Error>"""


def test_of_an_xml_answer_only_code_and_message_are_told(s3_server: S3Server) -> None:
    with serving(lambda exchange: exchange.send(400, EXPIRED, Connection="close")) as server:
        store = open_store("s3://bucket/x", StorageConfig(endpoint=server.url, signed_urls=False, **HASTY))
        for action, *arguments in ((store.write, "a", b""), (store.read, "a"), (store.delete, "a"), (store.size, "a")):
            with pytest.raises(PermissionError, match="400 Bad Request") as caught:
                action(*arguments)
            assert "a-secret" not in str(caught.value)
            assert action == store.size or str(caught.value).endswith("ExpiredToken: The token has expired.")


@pytest.mark.parametrize(
    ("url", "settings", "message"),
    [
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": "127.0.0.1:9"}, "AWS_ENDPOINT_URL is no URL such as"),
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": "http://user:a-secret@host"}, "AWS_ENDPOINT_URL is no URL such as"),
        ("s3://bucket/x", {"endpoint": "localhost:9"}, "storage.endpoint is no URL such as"),
        ("gs://bucket/x", {"endpoint": "http://127.0.0.1:9"}, "'endpoint' is not valid for store 'GCS'"),
        ("az://bucket/x", {}, "Account must be specified"),
        (
            "az://bucket/x",
            {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "a-secret!!"},
            "Invalid Access Key",
        ),
        ("gs://bucket/x", {"GOOGLE_SERVICE_ACCOUNT": "absent.json"}, "Unable to open service account file"),
        ("s3://bucket/x", {"AWS_PROFILE": "absent"}, r"config profile \(absent\) could not be found"),
    ],
)
def test_settings_that_cannot_be_right_are_an_error_at_once(
    url: str, settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in settings.keys() - {"endpoint"}:
        monkeypatch.setenv(name, settings[name])
    store = open_store(url, StorageConfig(endpoint=settings.get("endpoint")))
    for action, *arguments in ((store.write, "a", b""), (store.read, "a")):
        with pytest.raises(ValueError, match=message) as caught:
            action(*arguments)
        assert "a-secret" not in str(caught.value)


def test_without_credentials_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    for signed_urls in (True, False):
        store = open_store("s3://bucket/x", StorageConfig(retry_attempts=1, signed_urls=signed_urls))
        with pytest.raises(PermissionError, match="no credentials were found: set AWS_ACCESS_KEY_ID"):
            store.read("a")


def test_keys_of_others_that_are_no_paths_hide_nothing(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server answers that keeps such keys; SeaweedFS makes paths of them."""
    keys = ["set/", "set/a", "set//b", "set/../c", "set/a1", "set/d/e"]
    entry = "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>1</Size></Contents>"
    body = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{"".join(map(entry.format, keys))}'
    body += "<Name>bucket</Name><IsTruncated>false</IsTruncated></ListBucketResult>"

    with serving(lambda exchange: exchange.send(200, body.encode())) as server:
        store = open_store("s3://bucket/set", StorageConfig(endpoint=server.url, region="us-east-1", **HASTY))
        assert list(store.list()) == [("a", 1), ("a1", 1), ("d/e", 1)]
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(ValueError, match=r"cannot be listed.*set//b.*Delete that object, or `pip install boto3`"):
            list(store.list())


def test_prefixes_with_quoted_characters_are_swept(s3_server: S3Server) -> None:
    key = "a b#c/shard.tar"
    s3_server.client().create_multipart_upload(Bucket=BUCKET, Key=key)
    options = replace(s3_server.options, stale_temporary_hours=1e-9)
    store = open_store(f"s3://{BUCKET}/a%20b%23c", options)
    assert store.sweep() == ["shard.tar"]
    store.write("x", b"1")
    assert s3_server.client().head_object(Bucket=BUCKET, Key="a b#c/x")["ContentLength"] == 1
