"""`audiosep precompute`: a catalogue of clips into STFT shards. The same command, given again, makes what is missing.

Exit status: 0 all asked for is there; 2 a mistake to mend; 3 shards failed (named on stderr); 75 stopped by a signal.

Only light modules are imported here: the handlers of SIGTERM and SIGUSR1 must stand before torch is loaded."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from shards.progress import progress

if TYPE_CHECKING:
    from tqdm import tqdm

    from audiosep.dataset import Dataset, PrecomputeConfig
    from shards.writer import Record

DONE, FAILED, STOPPED = 0, 3, 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 4.0  # then the process ends whatever it is doing, which harms nothing: no shard is half committed
MAX_FAILURES = 3  # shards of one process, after which the trouble is not with the shards


class Stopped(Exception):
    """A signal asked us to stop."""


class StopRequest:
    """Turns stop signals, while in its block, into a question that is asked before each sample."""

    def __enter__(self) -> "StopRequest":
        self._asked = False
        self._handlers = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: os._exit(STOPPED))
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = True
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self._asked:
            raise Stopped


def main(arguments: Sequence[str]) -> int:
    with StopRequest() as request:
        try:
            return _precompute(arguments, request)
        except Stopped:
            print("Stopped by a signal; the same command goes on from here.", file=sys.stderr)
            return STOPPED


def _precompute(arguments: Sequence[str], request: StopRequest) -> int:
    from audiosep.catalogue import read_catalogue
    from audiosep.config import command_parser, load_config, plain
    from audiosep.dataset import Dataset, PrecomputeConfig
    from shards.manifest import format_ranges, parse_ranges

    parser = command_parser("precompute", __doc__, PrecomputeConfig)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--rank", type=int, default=0, help="make only shards rank, rank + world_size, ...")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--shards", help="make only these shards, such as 3,17,40-52")
    parser.add_argument("--plan", action="store_true", help="print as JSON what is missing, and make nothing")
    parser.add_argument("--begin", action="store_true", help="with --plan: bind the root to this config all the same")
    options, overrides = parser.parse_known_args(arguments)
    if not 0 <= options.rank < options.world_size:
        raise ValueError(f"--rank {options.rank} must be in 0..{options.world_size - 1}, below --world-size.")
    config = load_config(PrecomputeConfig, options.config, overrides)
    catalogue = read_catalogue(config.catalogue, config.check_files)
    dataset = Dataset(config, catalogue, dry_run=options.plan and not options.begin)
    request.check()
    plan = dataset.plan
    share = parse_ranges(options.shards) if options.shards else range(options.rank, plan.num_shards, options.world_size)
    if share and share[-1] >= plan.num_shards:
        raise ValueError(f"--shards names shard {share[-1]}, but there are only 0..{plan.num_shards - 1}.")
    unfinished, tally = dataset.survey(share)
    if options.plan:
        facts = {"root": config.root, "num_shards": plan.num_shards, "unfinished": unfinished}
        print(json.dumps(facts | {"spec_digest": plan.spec_digest, "storage": plain(config.storage)}))
        return DONE
    failures: dict[int, str] = {}
    total = sum(len(plan.samples(index)) for index in unfinished)
    with progress(total=total, unit="sample", desc=config.root) as bar:
        for index, result in _render(dataset, tuple(unfinished), request, bar):
            if isinstance(result, str):
                failures[index] = result
            else:
                tally.add(result.num_samples, result.rejected)
                unfinished.remove(index)
    for index, reason in failures.items():
        print(f"audiosep precompute: {config.root}/{plan.shard_name(index)} failed: {reason}", file=sys.stderr)
    if unfinished:
        ranges = format_ranges(unfinished)
        print(
            f"audiosep precompute: missing in {config.root}: shards {ranges}. The same command makes them.",
            file=sys.stderr,
        )
        return FAILED
    tally.check(config.max_rejected_fraction)
    if tally.num_rejected:
        print(f"audiosep precompute: {config.root}: {tally}", file=sys.stderr)
    return DONE


Result = tuple[int, "Record | str"]  # a shard's index, and its record or why it failed


def _render(dataset: "Dataset", indices: Sequence[int], request: StopRequest, bar: "tqdm[Any]") -> Iterator[Result]:
    """Render shards, here or in processes of their own; `bar` advances with each sample."""
    num_processes = min(dataset.config.num_processes, len(indices))
    if num_processes > 1:
        yield from _render_in_processes(dataset, indices, num_processes, request, bar)
        return

    def before_sample() -> None:
        request.check()
        bar.update()

    num_failures = 0
    for index in indices:
        result = _render_one(dataset, index, before_sample)
        yield index, result
        num_failures += isinstance(result, str)
        if num_failures == MAX_FAILURES:
            return


def _render_one(dataset: "Dataset", index: int, before_sample: Callable[[], None]) -> "Record | str":
    try:
        return dataset.render_shard(index, before_sample)
    except (ValueError, OSError) as error:
        return str(error)
    except Stopped:
        raise
    except Exception:  # our mistake: say where, and do not take the other shards down
        return traceback.format_exc()


def _render_in_processes(
    dataset: "Dataset", indices: Sequence[int], num_processes: int, request: StopRequest, bar: "tqdm[Any]"
) -> Iterator[Result]:
    """Render shards in spawned processes, each given the next shard when it has done one.

    A process that dies fails the shard it was at, and the others go on. All are ended before this returns."""
    context = multiprocessing.get_context("spawn")
    waiting = deque(indices)
    workers: dict[Connection, tuple[BaseProcess, int | None]] = {}  # at the parent's end of a pipe: who, at which shard
    temporary = tempfile.TemporaryDirectory(prefix="audiosep-")
    with temporary as folder:
        dataset.catalogue.save(Path(folder))
        resource_tracker.ensure_running()  # now, because starting it unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # also in the new processes, until they have handlers
        try:
            for _ in range(num_processes):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(target=_work, args=(theirs, dataset.config, folder), daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process, None
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            num_starting, num_failures = num_processes, 0
            while workers and (waiting or any(index is not None for _, index in workers.values())):
                request.check()
                for pipe in wait(list(workers), timeout=0.2):
                    assert isinstance(pipe, Connection)
                    process, index = workers[pipe]
                    try:
                        message = pipe.recv()
                    except (EOFError, ConnectionError):
                        process.join()
                        del workers[pipe]
                        request.check()
                        if index is not None:
                            yield index, f"its process died with exit code {process.exitcode}"
                        continue
                    if message is None:
                        bar.update()
                        continue
                    if message == READY:
                        num_starting -= 1
                        if num_starting == 0:  # all have mapped the catalogue: from here on a kill leaves nothing
                            temporary.cleanup()
                    elif index is not None:
                        yield index, message
                        num_failures += isinstance(message, str)
                        if num_failures >= MAX_FAILURES * num_processes:
                            waiting.clear()
                    workers[pipe] = process, waiting.popleft() if waiting else None
                    pipe.send(workers[pipe][1])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            for worker, index in workers.values():
                worker.kill() if index is None else worker.terminate()
            for worker, _ in workers.values():
                worker.join()


READY = "ready"


def _work(pipe: Connection, config: "PrecomputeConfig", catalogue_folder: str) -> None:
    """A process that renders the shards it is told to, until it is told None. It answers None for each sample begun,
    then the record, or why there is none."""
    with StopRequest() as request, suppress(Stopped, EOFError, ConnectionError):  # or nobody is left to work for
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        from audiosep.catalogue import Catalogue
        from audiosep.dataset import Dataset

        def before_sample() -> None:
            request.check()
            pipe.send(None)

        dataset = Dataset(config, Catalogue.load(Path(catalogue_folder)))
        pipe.send(READY)
        while (index := pipe.recv()) is not None:
            pipe.send(_render_one(dataset, index, before_sample))
