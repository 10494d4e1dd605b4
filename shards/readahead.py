"""Threads that fill batches row by row, a bounded number of batches ahead of their consumer."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from shards.batches import Batch, BufferRing, Layout
from shards.order import Draws, Integers
from shards.reader import CorruptSampleError, Margins, SampleReader

ROWS_AT_ONCE = 8  # that one thread takes, if there are enough for all


class Filling:
    """A batch while its rows are being read."""

    def __init__(self, positions: Integers, epoch_samples: int, draws: Draws, layout: Layout, ring: BufferRing) -> None:
        """`draws`: what stands at `positions`; beyond the epoch's end, what stands at its last position."""
        self.positions = positions
        self.inside = positions < epoch_samples
        self.draws = draws
        self.sources: list[int] = draws.source.tolist()
        self.samples: list[int] = draws.sample.tolist()
        self.fields = layout.fields
        self.tensors, self.rows = ring.take()
        self.found: list[Any] = [None] * len(positions)  # (key, text) or CorruptSampleError, once it is read
        self.failure: Exception | None = None
        self.num_unread = len(positions)

    @cached_property
    def damaged(self) -> dict[int, CorruptSampleError]:
        """What is wrong with which rows; for a batch that is filled."""
        return {row: found for row, found in enumerate(self.found) if isinstance(found, CorruptSampleError)}

    @cached_property
    def valid(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [B]: rows that hold the sample of their place, and nothing that only fills up the batch."""
        valid = self.inside.copy()
        valid[list(self.damaged)] = False
        return valid

    def batch(self) -> Batch:
        """The finished batch. Rows of damaged samples repeat a sound one, so that they are numbers like any other."""
        if self.damaged:
            sound = next((row for row in range(len(self.found)) if row not in self.damaged), None)
            for row in self.damaged:
                self.found[row] = ("", {}) if sound is None else self.found[sound]
                for tensor in self.tensors.values():
                    tensor[row] = 0 if sound is None else tensor[sound]
        keys, text = ([each[place] for each in self.found] for place in (0, 1))
        return Batch(keys, text, self.tensors, torch.from_numpy(self.valid), torch.from_numpy(self.positions))


class ReadAhead:
    """Reads what stands in `empty` batches and hands them out in their order.

    Which thread reads which row is left to chance; what stands in it is not."""

    def __init__(
        self,
        readers: Sequence[SampleReader],
        empty: Iterator[Filling],
        num_threads: int,
        num_busy: Callable[[], int],
        num_ahead: int,
        timeout_seconds: float,
    ) -> None:
        """`num_busy`: how many of the threads should read at once, just now. `num_ahead`: batches begun and not yet
        taken, at most. `timeout_seconds`: for one share of a batch, a few samples."""
        self._readers = readers
        self._empty = empty
        self._num_busy = num_busy
        self._num_ahead = num_ahead
        self._timeout_seconds = timeout_seconds
        lock = threading.Lock()
        self._room = threading.Condition(lock)
        self._ready = threading.Condition(lock)
        self._begun: deque[Filling] = deque()
        self._shares: Iterator[tuple[Filling, range]] = iter(())  # not yet given out, of the batch that was begun last
        self._reading: dict[int, tuple[float, Filling, range]] = {}  # since when each thread reads what
        self._busy = 0  # threads that are reading
        self._failure: BaseException | None = None
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def take(self) -> Filling:
        """The next batch, filled. Raises what its reading raised, and TimeoutError if a read is stuck."""
        with self._ready:
            while self._failure is None and not (self._begun and self._begun[0].num_unread == 0):
                if not any(thread.is_alive() for thread in self._threads):
                    raise RuntimeError("This iteration was begun in another process, in which its threads stayed.")
                self._ready.wait(timeout=1.0)
                self._check_progress()
            if self._failure is not None:
                raise self._failure
            filling = self._begun.popleft()
            self._room.notify()  # one thread; it wakes the next if there is more to read
        if filling.failure is not None:
            raise filling.failure
        return filling

    def _check_progress(self) -> None:
        for since, filling, rows in list(self._reading.values()):
            seconds = time.monotonic() - since
            if seconds > self._timeout_seconds:
                places = [self._readers[filling.sources[row]].place(filling.samples[row]) for row in rows]
                raise TimeoutError(
                    f"Reading has taken {seconds:.0f} s, more than read_timeout_seconds, at {', '.join(places)}: the "
                    "storage does not answer. Look at the file system or network, or allow more time."
                )

    def close(self) -> None:
        """Stop the threads behind the rows that they are reading; a stuck one is left behind after a second."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        deadline = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        try:
            fill = self._row_filler()
            while job := self._next_rows():
                filling, rows = job
                self._reading[threading.get_ident()] = (time.monotonic(), filling, rows)
                try:
                    fill(filling, rows)
                except Exception as error:
                    filling.failure = error
                del self._reading[threading.get_ident()]
                with self._ready:
                    self._busy -= 1
                    filling.num_unread -= len(rows)
                    if filling.num_unread == 0:
                        self._ready.notify()
        except BaseException as error:  # would end this thread in silence while the consumer waits
            with self._ready:
                self._failure = error
                self._ready.notify()

    def _next_rows(self) -> tuple[Filling, range] | None:
        """The next rows to read, once there is room for their batch; None when there are no more."""
        with self._room:
            while not self._closed:
                if self._busy >= self._num_busy():
                    self._room.wait()
                elif job := next(self._shares, None):
                    self._busy += 1
                    self._room.notify()
                    return job
                elif len(self._begun) < self._num_ahead:
                    filling = next(self._empty, None)
                    if filling is None:
                        return None
                    self._begun.append(filling)
                    self._shares = self._shared_out(filling)
                else:
                    self._room.wait()
        return None

    def _shared_out(self, filling: Filling) -> Iterator[tuple[Filling, range]]:
        """The rows of a batch in shares for the threads, each from one source, neighbours together where that pays."""
        size, sources, samples = len(filling.samples), filling.sources, filling.samples
        scattered = max(1, min(ROWS_AT_ONCE, size // len(self._threads)))
        start = 0
        for row in range(1, size + 1):
            if row < size and sources[row] == sources[start]:
                is_neighbour = samples[row] == samples[row - 1] + 1
                neighbours = self._readers[sources[row]].neighbours if is_neighbour else 1
                if row - start < max(scattered, neighbours):
                    continue
            yield filling, range(start, row)
            start = row

    def _widens(self, filling: Filling) -> bool:
        return filling.fields != self._readers[0].fields

    def _row_filler(self) -> Callable[[Filling, range], None]:
        """A function that reads rows of a batch; each thread has its own, with its own memory for margins."""
        margins: dict[int, list[Margins]] = {}  # for each source, as many as were needed at once
        narrow = Layout(self._readers[0].fields, ROWS_AT_ONCE)
        memory = torch.from_numpy(np.empty(narrow.num_bytes, np.uint8))
        narrow_rows, narrow_tensors = narrow.rows(memory.numpy()), narrow.tensors(memory)

        def fill(filling: Filling, rows: range) -> None:
            source = filling.sources[rows.start]
            reader, own = self._readers[source], margins.setdefault(source, [])
            own += (reader.margins() for _ in range(len(own), len(rows)))
            widen = self._widens(filling)
            # One sample at a time still is in the processor's caches when it is widened.
            at_once = min(reader.neighbours, ROWS_AT_ONCE) if widen else len(rows)
            for start in range(rows.start, rows.stop, at_once):
                these = slice(start, min(start + at_once, rows.stop))
                targets = narrow_rows if widen else filling.rows[these]
                filling.found[these] = reader.read(filling.samples[these], targets, own)
                if widen:
                    for name, tensor in narrow_tensors.items():
                        filling.tensors[name][these].copy_(tensor[: these.stop - these.start])

        return fill
