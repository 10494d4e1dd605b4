"""Batches, and the memory they live in: used again as soon as the last tensor that looks at it is gone."""

import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.tar import Field

Rows = list[list[memoryview]]  # [B][fields]


@dataclass(frozen=True)
class Batch:
    """B samples. All tensors of a batch share one piece of memory, which is theirs for as long as any of them lives."""

    keys: list[str]
    text: list[dict[str, Any]]
    arrays: dict[str, torch.Tensor]
    """Each field's tensor [B, ...], in the type it is stored in or in float32."""
    valid: torch.Tensor
    """bool [B]: False for rows that only fill up the batch (at the end of an evaluation, or in place of a damaged
    sample) and hold another sample a second time. Losses and metrics must leave them out."""
    positions: torch.Tensor
    """int64 [B]: places in the epoch's order."""
    lengths: dict[str, torch.Tensor] = field(default_factory=dict)
    """int64 [B, axes] for each tensor of a batch that was collated from samples: the shape that each had before it was
    padded with zeros. Samples of sealed data sets, by index, have one shape; nothing stands here for them."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The same batch with its tensors on another device."""
        arrays = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.arrays.items()}
        lengths = {name: tensor.to(device) for name, tensor in self.lengths.items()}
        valid, positions = self.valid.to(device), self.positions.to(device)
        return replace(self, arrays=arrays, valid=valid, positions=positions, lengths=lengths)


@dataclass(frozen=True)
class Layout:
    """Where a batch's tensors stand in its memory: one field after another, each from a multiple of 64 bytes on."""

    fields: tuple[Field, ...]
    batch_size: int

    @property
    def num_bytes(self) -> int:
        return self._starts[-1]

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for item in self.fields:
            starts.append(starts[-1] + -(-self.batch_size * item.num_bytes // 64) * 64)
        return starts

    def rows(self, memory: NDArray[np.uint8]) -> Rows:
        """For each row of the batch, its bytes in each field."""
        by_field = [
            memory[start : start + self.batch_size * item.num_bytes].reshape(self.batch_size, item.num_bytes)
            for start, item in zip(self._starts, self.fields)
        ]
        return [[field_row.data for field_row in row] for row in zip(*by_field)]

    def tensors(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each field's tensor [B, ...] as a view of `memory`, uint8 [num_bytes]."""
        return {
            item.name: memory[start : start + self.batch_size * item.num_bytes]
            .view(getattr(torch, item.dtype))
            .view(self.batch_size, *item.shape)
            for start, item in zip(self._starts, self.fields)
        }


class BufferRing:
    """Pieces of memory of one size, lent out as the tensors of a batch and taken back when those are gone.

    Fresh memory is several times slower to fill than memory used before, so batches go round in a few pieces. When
    none is free a new one is made: a consumer that keeps its batches, such as list(loader), pays their memory and
    never waits for itself."""

    def __init__(self, layout: Layout, num_kept: int, pinned: bool) -> None:
        """`num_kept`: free pieces kept at most. `pinned`: page-locked, for copies to a GPU beside computation."""
        self._layout = layout
        self._pinned = pinned
        self._free: deque[tuple[_Piece, torch.cuda.Event | None]] = deque(maxlen=num_kept)

    def take(self) -> tuple[dict[str, torch.Tensor], Rows]:
        """The tensors of a batch and their rows, to be filled. The memory comes back when the last tensor is gone."""
        try:
            piece, last_use = self._free.pop()
        except IndexError:
            memory = self._fresh()
            piece, last_use = _Piece(memory, self._layout.rows(memory)), None
        if last_use is not None:
            last_use.synchronize()
        view = piece.memory[:]  # an object of its own, which the tensors keep alive (views of it in numpy would not)
        # The garbage collector calls this from whatever thread and line it interrupts: it may take no lock.
        weakref.finalize(view, self._give_back, piece).atexit = False
        return self._layout.tensors(torch.from_numpy(view)), piece.rows

    def _fresh(self) -> NDArray[np.uint8]:
        if self._pinned:
            return torch.empty(self._layout.num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(self._layout.num_bytes, np.uint8)  # on huge pages, unlike torch's

    def _give_back(self, piece: "_Piece") -> None:
        last_use = torch.cuda.Event() if self._pinned else None
        if last_use is not None:
            last_use.record()  # copies to the GPU, queued on the current stream, may still read the memory
        self._free.append((piece, last_use))


@dataclass(frozen=True)
class _Piece:
    memory: NDArray[np.uint8]
    rows: Rows
