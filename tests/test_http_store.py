"""Http servers that answer in every odd way they may: what is read is right, and what cannot be is said at once."""

import base64
import gzip
import itertools
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from fake_server import CONTENT, Exchange, serving

from shards.manifest import load_manifest
from shards.storage import open_store
from shards.store import StorageConfig, Store, TransferError

OPTIONS = StorageConfig(retry_seconds=20.0, retry_attempts=8, backoff_seconds=0.001, stall_seconds=5.0)


def row_of(store: Store, name: str = "a", offset: int = 7) -> bytes:
    row = np.empty(1000, np.uint8)
    store.read_range(name, offset, [row])
    return row.tobytes()


def test_a_session_that_expired_is_answered_400_and_signed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(exchange: Exchange) -> None:
        if "X-Amz-Security-Token=OLD" in exchange.path:
            os.environ["AWS_SESSION_TOKEN"] = "NEW"  # as whoever renews credentials does
            exchange.send(400, b"<Error><Code>ExpiredToken</Code></Error>")
        else:
            exchange.serve()

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "OLD")
    with serving(answer) as server:
        store = open_store("s3://bucket/set", replace(OPTIONS, endpoint=server.url, region="us-east-1"))
        assert row_of(store) == CONTENT[7:1007]
        assert len(server.requests) == 2
    with serving(lambda exchange: exchange.send(400)) as server:
        store = open_store("s3://bucket/set", replace(OPTIONS, endpoint=server.url, region="us-east-1"))
        with pytest.raises(PermissionError, match=r"after 3 attempts.*400"):
            row_of(store)
        with pytest.raises(TransferError, match=r"after 1 attempts.*400") as caught:
            row_of(open_store(server.url, OPTIONS))
        assert not isinstance(caught.value, PermissionError)


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (404, FileNotFoundError)])
def test_what_was_refused_until_it_was_given_up_is_a_failed_transfer_too(status: int, kind: type[OSError]) -> None:
    with serving(lambda exchange: exchange.send(status)) as server:
        with pytest.raises(kind, match=f"after 3 attempts.*{status}") as caught:
            row_of(open_store(server.url, OPTIONS))
        assert isinstance(caught.value, TransferError)


def test_a_token_is_sent_to_its_server_only_and_a_file_that_holds_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with (
        serving(lambda exchange: exchange.serve()) as mirror,
        serving(lambda exchange: exchange.send(302, Location=mirror.url + exchange.path)) as server,
    ):
        store = open_store(server.url, replace(OPTIONS, http_token_file=str(file)))
        with pytest.raises(ValueError, match=f"http_token_file {file} cannot be read: No such file"):
            load_manifest(store)
        for text in ("hf_SECRET\nInjected: 1", "hf_SECRETé", "", "hf SECRET", "hf_SECRET\0"):
            file.write_text(text)
            with pytest.raises(ValueError, match=f"http_token_file {file} does not hold a token") as caught:
                row_of(store)
            assert "SECRET" not in str(caught.value)
        assert server.requests == []
        file.write_text(" hf_SECRET\n")
        assert row_of(store) == CONTENT[7:1007]
        assert [headers["Authorization"] for _, headers in server.requests] == ["Bearer hf_SECRET"]
        assert [headers["Authorization"] for _, headers in mirror.requests] == [None]


def test_retry_after_is_waited_for_as_a_number_or_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    asked = iter(["7", formatdate(time.time() + 9, usegmt=True), "soon", formatdate(0, usegmt=True), None, "3600"])

    def answer(exchange: Exchange) -> None:
        exchange.send(503, Retry_After=next(asked))

    gives_up = pytest.raises(TransferError, match=r"after 6 attempts.*503.* and asks for 3600 s of pause")
    with serving(answer) as server, gives_up:
        row_of(open_store(server.url, OPTIONS))
    assert pauses[0] == 7
    assert 5 < pauses[1] <= 9
    assert max(pauses[2:]) < 1
    assert len(pauses) == 5


def cut(exchange: Exchange) -> None:
    exchange.send(206, CONTENT[7:907], Content_Length="1000", Content_Range="bytes 7-1006/100000", Connection="close")


@pytest.mark.parametrize("failing", [None, cut, lambda exchange: exchange.send(503)], ids=["gone", "cuts", "503"])
def test_a_redirect_is_remembered_until_where_it_leads_fails(failing: Callable[[Exchange], None] | None) -> None:
    with (
        serving(lambda exchange: exchange.serve()) as other,
        serving(lambda exchange: exchange.send(302, Location=mirror.url + exchange.path)) as server,
    ):
        store = open_store(server.url, OPTIONS)
        with serving(lambda exchange: exchange.serve(Connection="close")) as first:
            mirror = first
            for _ in range(3):
                assert row_of(store) == CONTENT[7:1007]
            assert len(server.requests) == 1
            mirror = other
            if failing:
                first.answer = failing
                assert row_of(store) == CONTENT[7:1007]
        assert row_of(store) == CONTENT[7:1007]
        assert len(server.requests) == 2
        assert len(other.requests) == 1 + (failing is not None)


@pytest.mark.parametrize(
    ("status", "location", "reason"),
    [
        (302, "ftp://127.0.0.1/x?signature=SECRET", "redirects to ftp:, and only http and https are followed"),
        (302, "file:///etc/passwd", "redirects to file:, and only http and https are followed"),
        (301, None, "answered 301 Moved Permanently, no Location: for S3, is the region right"),
        (302, "/a?signature=SECRET", "redirects in a circle, or more than 5 times"),
    ],
)
def test_redirects_that_lead_nowhere_are_told(status: int, location: str | None, reason: str) -> None:
    gives_up = pytest.raises(TransferError, match=f"after 3 attempts.*{reason}")
    with serving(lambda exchange: exchange.send(status, Location=location)) as server, gives_up as caught:
        row_of(open_store(server.url, OPTIONS))
    assert "SECRET" not in str(caught.value)


def test_five_redirects_to_unquoted_places_are_followed() -> None:
    steps = iter([*(f"/{step} a%zzü" for step in range(5)), None])

    def answer(exchange: Exchange) -> None:
        location = next(steps)
        if location:
            exchange.send(307, Location=location.encode().decode("latin-1"))
        else:
            exchange.serve()

    with serving(answer) as server:
        assert row_of(open_store(server.url, OPTIONS)) == CONTENT[7:1007]
        assert [path for path, _ in server.requests] == ["/a", *(f"/{step}%20a%25zz%C3%BC" for step in range(5))]


def test_a_length_that_is_too_small_is_not_taken_for_the_whole_object() -> None:
    answers = itertools.count()

    def sound_at_last(exchange: Exchange) -> None:
        exchange.serve(**({} if next(answers) % 2 else {"Content_Length": "3"}))

    with serving(sound_at_last) as server:
        store = open_store(server.url, OPTIONS)
        assert store.read("a") == CONTENT
        assert b"".join(map(bytes, store.stream("a", 5))) == CONTENT[5:]
        assert b"".join(map(bytes, store.stream("a"))) == CONTENT


def test_empty_objects_are_read_from_servers_with_and_without_ranges() -> None:
    answers: list[Callable[[Exchange], None]] = [
        lambda exchange: exchange.serve(b""),
        lambda exchange: exchange.send(416),
        lambda exchange: exchange.send(200),
    ]
    for answer in answers:
        with serving(answer) as server:
            store = open_store(server.url, OPTIONS)
            assert store.read("a") == b""
            assert list(store.stream("a")) == []
            assert store.size("a") == 0
            assert len(server.requests) == 3
    with serving(lambda exchange: exchange.send(200, CONTENT)) as server:
        assert open_store(server.url, OPTIONS).read("a") == CONTENT


@pytest.mark.parametrize("folder", ["a b", "%q", "100%", "a%20b", "ü", "列", "a+b&c=d;e", "~x/(y)"])
def test_folders_of_any_name_are_asked_for_with_what_must_be_quoted(folder: str) -> None:
    with serving(lambda exchange: exchange.serve()) as server:
        store = open_store(f"{server.url}/{folder}", OPTIONS)
        assert row_of(store, "ä b%20.tar") == CONTENT[7:1007]
        [(path, _)] = server.requests
        assert unquote(path) == f"/{folder.replace('%20', ' ')}/ä b%20.tar"
        assert re.fullmatch(r"(%[0-9A-F]{2}|[!$&-;=@-Z_a-z~])+", path)
        assert store.url == f"{server.url}/{folder}"


def test_answers_whose_end_cannot_be_told_are_tried_three_times_and_explained() -> None:
    def chunked(exchange: Exchange) -> None:
        exchange.send(200, b"3\r\nabc\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")

    def compressed(exchange: Exchange) -> None:
        exchange.send(200, gzip.compress(CONTENT), Content_Encoding="gzip")

    for answer, reason in (
        (chunked, r"tells no length \(Content-Length '', Transfer-Encoding 'chunked'\).*serve the files as they are"),
        (compressed, r"encodes its answers \(gzip\), which was not asked for.*switch that off"),
    ):
        with serving(answer) as server:
            with pytest.raises(TransferError, match=f"after 3 attempts.*{reason}"):
                open_store(server.url, OPTIONS).read("a")
            assert len(server.requests) == 3


def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    hosts = (f"http://host-{number}.invalid/set" for number in itertools.count())  # none is asked for by name

    def guarded(exchange: Exchange) -> None:
        if exchange.headers["Proxy-Authorization"] == f"Basic {base64.b64encode(b'us er:SEC@RET').decode()}":
            exchange.serve()
        else:
            exchange.send(407)

    with serving(guarded) as guard, serving(lambda exchange: exchange.serve()) as plain:
        place = guard.url.removeprefix("http://")
        for name, value in (
            ("http_proxy", plain.url),
            ("http_proxy", plain.url.removeprefix("http://")),
            ("all_proxy", plain.url),
            ("http_proxy", f"http://us%20er:SEC%40RET@{place}"),
            ("all_proxy", f"us%20er:SEC%40RET@{place}"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                url = next(hosts)
                assert row_of(open_store(url, OPTIONS)) == CONTENT[7:1007]
                assert (guard if "@" in value else plain).requests[-1][0] == f"{url}/a"
        monkeypatch.setenv("http_proxy", f"http://user:SECRET@{place}")
        with pytest.raises(TransferError, match="407") as caught:
            row_of(open_store(next(hosts), OPTIONS))
        assert "SECRET" not in str(caught.value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert row_of(open_store(plain.url, OPTIONS)) == CONTENT[7:1007]
        assert plain.requests[-1][0] == "/a"
        for value in ("socks5://user:SECRET@127.0.0.1:1", "http://user:SECRET@127.0.0.1:x", "http://user:SECRET@[::1"):
            monkeypatch.setenv("http_proxy", value)
            with pytest.raises(ValueError, match=r"a proxy for http://host-.*set http_proxy to such a one") as wrong:
                row_of(open_store(next(hosts), OPTIONS))
            assert "SECRET" not in str(wrong.value)


def test_a_tunnel_through_a_proxy_is_asked_for_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def connect(exchange: Exchange) -> None:
        asked.append((exchange.path, exchange.headers["Proxy-Authorization"]))
        exchange.send(502)

    monkeypatch.setattr(Exchange, "do_CONNECT", connect, raising=False)
    with serving(lambda exchange: exchange.send(500)) as server:
        monkeypatch.setenv("https_proxy", server.url.replace("//", "//user:SECRET@"))
        with pytest.raises(TransferError, match="502") as caught:
            row_of(open_store("https://tunnelled.invalid/set", replace(OPTIONS, retry_attempts=2)))
    assert asked == [("tunnelled.invalid:443", f"Basic {base64.b64encode(b'user:SECRET').decode()}")] * 2
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http:///set", "http://127.0.0.1:x/set", "http://127.0.0.1:99999/set", "http://a..b/set", "http://a b/set"]
)
def test_urls_that_can_be_no_servers_are_errors_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    with pytest.raises(ValueError, match=r"http://.* (cannot be connected to: |must be named behind )"):
        row_of(open_store(url, OPTIONS))
