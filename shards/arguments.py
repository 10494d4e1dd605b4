"""Command lines, of `shards` and `audiosep` alike."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Its errors name options, but repeat no other word that was given: any may be a secret behind a mistyped name."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, which takes --UNKNOWN=VALUE for a positional argument where there is a space in the value."""
        words = list(sys.argv[1:] if args is None else args)
        unknown = [word for word in words if re.match("--.*=.* ", word) and not self._knows(word.partition("=")[0])]
        options, others = super().parse_known_args([word for word in words if word not in unknown], namespace)
        return options, others + unknown

    def _knows(self, name: str) -> bool:
        return any(known.startswith(name) for known in self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        shown = re.match(r"unrecognized arguments:( --[a-z][\w.-]*(?= |=|$))*|[^'\"=]*", message)
        super().error(shown[0].rstrip(": ") if shown else "")
