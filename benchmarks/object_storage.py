"""Reading shards over http and from s3, side by side with webdataset, MosaicML Streaming and a bare boto3 stream.

    python -m benchmarks.object_storage [--samples 384] [--rounds 3]

It takes about ten minutes and writes benchmarks/results/object_storage.md.

Real servers (nginx, SeaweedFS) run on loopback and hold the same samples for everyone. Every reader runs in a process
of its own, in turn, for some rounds; the table gives the medians. Peers that cannot be had are left out and named."""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from servers import ACCESS_KEY, BUCKET, SECRET_KEY, HttpServer, S3Server, Server  # noqa: E402

from shards.copy import copy  # noqa: E402
from shards.manifest import bind, seal  # noqa: E402
from shards.storage import open_store  # noqa: E402
from shards.store import StorageConfig  # noqa: E402
from shards.tar import Sample  # noqa: E402
from shards.writer import write_shard  # noqa: E402

SHAPE = (1, 501, 1025)  # 5 s at 32 kHz: two of these as float16 are 2.05 MB
BATCH_SIZE = 16
PASSES = 4  # over the samples in each measurement
OUR_PASSES = 16  # in one epoch of ours, which then takes seconds: a real one takes hours, and its ends cost nothing
LATENCY_SECONDS = 0.03
WARM_SECONDS, MEASURED_SECONDS = 3.0, 2.0  # at least, and whole passes
BLOCK_SAMPLES = 8  # as in configs/train
OURS = f"ours, blocks of {BLOCK_SAMPLES}"
WHOLE = f"ours, blocks of {BATCH_SIZE}, a batch a request, 6 at once"


def make_samples(num_samples: int) -> Iterator[Sample]:
    rng = np.random.default_rng(0)
    pool = [rng.random(SHAPE, np.float32).astype(np.float16) for _ in range(8)]
    for index in range(num_samples):
        arrays = {"stft_mixture.2048": pool[index % 8], "stft_segment.2048": pool[(index // 8 + 1) % 8]}
        yield Sample(f"{index:09d}", {"text": f"sound {index}"}, arrays)


Epoch = Callable[[], int]  # reads everything some times and returns the number of samples


def ours(url: str, storage: dict[str, Any], **options: Any) -> Epoch:
    from shards.loader import ShardLoader

    options |= {"batch_size": BATCH_SIZE, "drop_last": False, "repeat": OUR_PASSES}
    loader = ShardLoader(url, storage=StorageConfig(**storage), **options)
    return lambda: sum(int(batch.valid.sum()) for batch in loader)


def webdataset(urls: list[str]) -> Epoch:
    import webdataset as wds

    fields = ("__key__", "stft_mixture.2048.npy", "stft_segment.2048.npy")
    samples = wds.WebDataset(urls * PASSES, shardshuffle=False).decode().to_tuple(*fields).batched(BATCH_SIZE)
    return lambda: sum(len(keys) for keys, *_ in samples)


def mosaicml(remote: str, endpoint: str) -> Epoch:
    os.environ["S3_ENDPOINT_URL"] = endpoint
    streaming = _import_streaming()
    from torch.utils.data import DataLoader

    def epoch() -> int:
        num_samples = 0
        for _ in range(PASSES):
            with tempfile.TemporaryDirectory() as local:
                data = streaming.StreamingDataset(remote=remote, local=local, shuffle=False, batch_size=BATCH_SIZE)
                num_samples += sum(len(batch["key"]) for batch in DataLoader(data, batch_size=BATCH_SIZE))
        return num_samples

    return epoch


def boto3_stream(endpoint: str, keys: list[str], num_samples: int) -> Epoch:
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")

    def epoch() -> int:
        for key in keys * PASSES:
            for _ in client.get_object(Bucket=BUCKET, Key=key)["Body"].iter_chunks(1 << 20):
                pass
        return num_samples * PASSES

    return epoch


def bare_http(urls: list[str], num_samples: int) -> Epoch:
    """What the server and the network give: two threads read whole objects into small buffers, and nothing more."""
    import http.client
    import threading
    from urllib.parse import urlsplit

    def work(own: list[str]) -> None:
        connection, view = http.client.HTTPConnection(urlsplit(own[0]).netloc), bytearray(1 << 20)
        for url in own * PASSES:
            connection.request("GET", url.split(urlsplit(url).netloc, 1)[1])
            response = connection.getresponse()
            while response.readinto(view):
                pass

    def epoch() -> int:
        threads = [threading.Thread(target=work, args=(urls[part::2],)) for part in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return num_samples * PASSES

    return epoch


def _import_streaming() -> Any:
    """MosaicML Streaming, with a stand-in for torchvision, which only its picture data sets use."""
    import transformers.utils  # noqa: F401  # looks for the real one first

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = MagicMock(VisionDataset=object)
    import streaming

    return streaming


def write_mds(folder: str, num_samples: int) -> None:
    shape = ",".join(map(str, SHAPE))
    columns = {
        "key": "str",
        "text": "json",
        "mixture": f"ndarray:float16:{shape}",
        "segment": f"ndarray:float16:{shape}",
    }
    with _import_streaming().MDSWriter(out=folder, columns=columns, size_limit=1 << 26) as writer:
        for sample in make_samples(num_samples):
            mixture, segment = sample.arrays.values()
            writer.write({"key": sample.key, "text": sample.text, "mixture": mixture, "segment": segment})


READERS: dict[str, Callable[..., Epoch]] = {
    each.__name__: each for each in (ours, webdataset, mosaicml, boto3_stream, bare_http)
}


def cpu_seconds() -> float:
    """Of this process and the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_here(name: str, arguments: dict[str, Any]) -> None:
    """Read for a while, until connections are open and memory is in use, then print samples, seconds, CPU seconds."""
    if name == "write_mds":
        write_mds(**arguments)
        return
    epoch = READERS[name](**arguments)
    for least_seconds in (WARM_SECONDS, MEASURED_SECONDS):
        num_samples, started, cpu = 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() < started + least_seconds:
            num_samples += epoch()
    print(json.dumps([num_samples, time.perf_counter() - started, cpu_seconds() - cpu]))


def run(name: str, arguments: dict[str, Any], peers: str) -> str:
    """What a reader prints last in a process of its own. Raises RuntimeError with its last words."""
    command = [sys.executable, __file__, "--run", name, json.dumps(arguments)]
    paths = [str(HERE.parent), peers, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip().rpartition("\n")[2]


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def latency_proxy(upstream: str, seconds: float) -> Iterator[str]:
    """A proxy before a server that makes each answer late; gives its URL."""
    command = [sys.executable, str(HERE.parent / "tests" / "lossy_proxy.py"), upstream.rpartition(":")[2]]
    process = subprocess.Popen([*command, "--latency", str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(options.run[0], json.loads(options.run[1]))
        return
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "s3").mkdir()
        (folder / "http").mkdir()
        web, s3 = HttpServer(folder / "http"), S3Server(folder / "s3")
        stack.enter_context(running(web))
        stack.enter_context(running(s3))
        peers, missing = install_peers(folder / "peers"), []
        root = make_data(web, s3, folder, options.samples)
        cases = the_cases(web, s3, root, options.samples, stack)
        try:
            run("write_mds", {"folder": str(folder / "mds"), "num_samples": options.samples}, peers)
            upload_folder(s3, folder / "mds", "mds")
        except RuntimeError as error:
            missing.append(str(error))
            del cases["s3", "MosaicML Streaming, cold cache"]
        results = measure(cases, options.rounds, peers)
    report = describe(results, missing, options.samples, root)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "object_storage.md").write_text(report)
    print(report)


def install_peers(folder: Path) -> str:
    """A folder for PYTHONPATH with the peers, where they are not installed already."""
    if importlib.util.find_spec("streaming"):
        return ""
    requirements = str(HERE / "peers.txt")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "-r", requirements]
    subprocess.run(command, check=False, capture_output=True)
    return str(folder)


def make_data(web: HttpServer, s3: S3Server, folder: Path, num_samples: int) -> str:
    """The data set behind nginx and in the bucket, read once so that both servers have it in memory."""
    store = open_store(web.files / "set")
    plan = bind(store, {"benchmark": "object storage"}, num_samples, 32)
    samples = make_samples(num_samples)
    for index in range(plan.num_shards):
        size = len(plan.samples(index))
        chosen = (next(samples) for _ in range(size))
        write_shard(store, plan.shard_name(index), chosen, num_samples=size, spec_digest=plan.spec_digest)
    seal(store)
    copy(store, open_store(f"s3://{BUCKET}/set", s3.options))
    ours(f"s3://{BUCKET}/set", {"endpoint": s3.endpoint})()
    return str(web.files / "set")


def upload_folder(s3: S3Server, folder: Path, prefix: str) -> None:
    source, target = open_store(folder), open_store(f"s3://{BUCKET}/{prefix}", s3.options)
    for name, _ in source.list():
        target.write(name, source.read(name))


Cases = dict[tuple[str, str], tuple[str, dict[str, Any]]]


def the_cases(web: HttpServer, s3: S3Server, root: str, num_samples: int, stack: ExitStack) -> Cases:
    """Who reads what: (server, reader) to the function and its arguments."""
    import boto3

    tars = [name for name, _ in open_store(root).list("shard") if name.endswith(".tar")]
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    signed = [client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": f"set/{name}"}) for name in tars]
    storage: dict[str, Any] = {"endpoint": s3.endpoint}
    bucket, keys = f"s3://{BUCKET}/set", [f"set/{name}" for name in tars]
    whole = {"storage": storage | {"request_bytes": 1 << 26}, "block_samples": BATCH_SIZE, "num_threads": 6}
    cases: Cases = {
        ("http", OURS): ("ours", {"url": f"{web.url}/set", "storage": {}, "block_samples": BLOCK_SAMPLES}),
        ("http", "ours, single samples"): ("ours", {"url": f"{web.url}/set", "storage": {}}),
        ("http", f"{OURS}, no checksums"): (
            "ours",
            {"url": f"{web.url}/set", "storage": {}, "block_samples": BLOCK_SAMPLES, "checksums": False},
        ),
        ("http", "webdataset, pipe:curl"): (
            "webdataset",
            {"urls": [f"pipe:curl -s {web.url}/set/{name}" for name in tars]},
        ),
        ("http", "http.client, bare streams"): (
            "bare_http",
            {"urls": [f"{web.url}/set/{name}" for name in tars], "num_samples": num_samples},
        ),
        ("s3", "http.client, bare streams (presigned)"): ("bare_http", {"urls": signed, "num_samples": num_samples}),
        ("s3", OURS): ("ours", {"url": bucket, "storage": storage, "block_samples": BLOCK_SAMPLES}),
        ("s3", "ours, single samples"): ("ours", {"url": bucket, "storage": storage}),
        ("s3", f"{OURS}, no checksums"): (
            "ours",
            {"url": bucket, "storage": storage, "block_samples": BLOCK_SAMPLES, "checksums": False},
        ),
        ("s3", WHOLE): ("ours", {"url": bucket, **whole}),
        ("s3", f"{WHOLE}, no checksums"): ("ours", {"url": bucket, **whole, "checksums": False}),
        ("s3", "ours, single samples, signed_urls: false"): (
            "ours",
            {"url": bucket, "storage": storage | {"signed_urls": False}},
        ),
        ("s3", "boto3, bare stream"): (
            "boto3_stream",
            {"endpoint": s3.endpoint, "keys": keys, "num_samples": num_samples},
        ),
        ("s3", "webdataset, pipe:curl (presigned)"): (
            "webdataset",
            {"urls": [f"pipe:curl -s '{url}'" for url in signed]},
        ),
        ("s3", "webdataset, pipe:aws s3 cp"): (
            "webdataset",
            {"urls": [f"pipe:aws --endpoint-url {s3.endpoint} s3 cp s3://{BUCKET}/{key} -" for key in keys]},
        ),
        ("s3", "MosaicML Streaming, cold cache"): (
            "mosaicml",
            {"remote": f"s3://{BUCKET}/mds", "endpoint": s3.endpoint},
        ),
    }
    if subprocess.run(["aws", "--version"], capture_output=True, check=False).returncode:
        del cases["s3", "webdataset, pipe:aws s3 cp"]
    for seconds in (0.0, LATENCY_SECONDS):
        label = f"{OURS}, through a proxy, {seconds * 1000:.0f} ms late"
        http_proxy = stack.enter_context(latency_proxy(web.url, seconds))
        s3_proxy = stack.enter_context(latency_proxy(s3.endpoint, seconds))
        blocks = {"block_samples": BLOCK_SAMPLES}
        cases["http", label] = ("ours", {"url": f"{http_proxy}/set", "storage": {}, **blocks})
        cases["s3", label] = ("ours", {"url": bucket, "storage": {"endpoint": s3_proxy}, **blocks})
    return cases


def measure(cases: Cases, rounds: int, peers: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Median samples/s and CPU seconds for each sample, of each reader; all of them once in each round."""
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, (name, arguments) in cases.items():
            num_samples, seconds, cpu = json.loads(run(name, arguments, peers))
            runs[case].append((num_samples / seconds, cpu / num_samples))
            print(f"{case[0]:5} {case[1]:45} {num_samples / seconds:8.0f} samples/s", flush=True)
    return {
        case: (statistics.median(r for r, _ in each), statistics.median(c for _, c in each))
        for case, each in runs.items()
    }


def describe(
    results: dict[tuple[str, str], tuple[float, float]], missing: list[str], num_samples: int, root: str
) -> str:
    gigabytes = 2 * 2 * float(np.prod(SHAPE)) / 1e9  # of one sample
    lines = [
        "# Reading from object storage",
        "",
        f"`python -m benchmarks.object_storage` on {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}: {num_samples} samples of 2.05 MB in shards of 32, batches of {BATCH_SIZE}, no "
        "worker processes; servers on the same cores. Medians of rounds in turn, each of at least "
        f"{MEASURED_SECONDS:.0f} s after at least {WARM_SECONDS:.0f} s in a process of its own; CPU is the client's, "
        f"children included. Ours reads in shuffled order, {OUR_PASSES} passes to an epoch, and checks all "
        "checksums, unless a row says otherwise.",
        "",
        "| from | reader | samples/s | MB/s | CPU s/GB |",
        "|---|---|---:|---:|---:|",
    ]
    for (server, reader), (rate, cpu) in sorted(results.items(), key=lambda item: item[0][0]):
        speed = rate * gigabytes * 1000
        lines.append(f"| {server} | {reader} | {rate:.0f} | {speed:.0f} | {cpu / gigabytes:.2f} |")
    lines += ["", "| floor | wanted | measured |", "|---|---:|---:|"]
    lines += [f"| {what} | {wanted} | {found} |" for what, wanted, found in floors(results)]
    if missing:
        lines += ["", "Not measured: " + "; ".join(missing)]
    return "\n".join(lines) + "\n"


def floors(results: dict[tuple[str, str], tuple[float, float]]) -> Iterator[tuple[str, str, str]]:
    """What was promised: name, bound, and the ratio that was measured."""
    http, curl = results["http", OURS], results["http", "webdataset, pipe:curl"]
    yield "http: samples/s against webdataset pipe:curl", ">= 5", f"{http[0] / curl[0]:.1f}"
    yield "http: CPU per GB against webdataset pipe:curl", "<= 0.2", f"{http[1] / curl[1]:.2f}"
    for ours in (OURS, WHOLE):
        rate, cpu = results["s3", ours]
        for (server, reader), (its_rate, its_cpu) in results.items():
            if server == "s3" and reader.startswith(("webdataset", "MosaicML")):
                wanted = ">= 5" if reader.startswith("webdataset") else ">= 4"
                yield f"s3: samples/s of {ours} against {reader}", wanted, f"{rate / its_rate:.1f}"
            if server == "s3" and reader.startswith("boto3"):
                yield f"s3: CPU per GB of {ours} against a {reader}", "<= 1.3", f"{cpu / its_cpu:.2f}"
    for server in ("http", "s3"):
        late, prompt = (results[server, f"{OURS}, through a proxy, {ms} ms late"][0] for ms in (30, 0))
        yield f"{server}: throughput with 30 ms of latency against none", ">= 0.7", f"{late / prompt:.2f}"


if __name__ == "__main__":
    main()
