"""How far long work has come."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0
LOG_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n"


def progress(work: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """A bar on a terminal; in a log a line every half a minute, for work that takes longer. `options` are tqdm's."""
    if not sys.stderr.isatty():
        options |= dict.fromkeys(("mininterval", "maxinterval", "delay"), LOG_SECONDS) | {"bar_format": LOG_LINE}
    return tqdm(work, **options)
