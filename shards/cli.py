"""The `shards` command: what one does with a data set in a folder or bucket, each imported only when asked for."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from shards.manifest import IncompleteError, seal
from shards.storage import open_store

COMMANDS = {
    "seal": ("shards.cli", "check that every shard is complete and write manifest.json"),
}
INCOMPLETE = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `shards COMMAND ...`.

    Exit status 0 is success, 2 a failure explained in one message, 3 shards missing or bad (named)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:8} {meaning}" for name, (_, meaning) in COMMANDS.items())
        print(f"usage: shards COMMAND ...\n\n{listing}\n\nROOT is a folder or a URL. See also shards COMMAND --help.")
        return 0
    command = words.pop(0)
    if command not in COMMANDS:
        print(f"shards: no command {command!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return getattr(importlib.import_module(COMMANDS[command][0]), f"{command}_command")(words)
    except IncompleteError as error:
        print(f"shards {command}: {error}", file=sys.stderr)
        return INCOMPLETE
    except (ValueError, OSError) as error:
        print(f"shards {command}: {error}", file=sys.stderr)
        return 2


def seal_command(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="shards seal", description="Check that all is there; write manifest.json.")
    parser.add_argument("root", help="folder or URL that shards were written to")
    parser.add_argument("--threads", type=int, help="records read at once (default: enough to hide the latency)")
    options = parser.parse_args(arguments)
    manifest = seal(open_store(options.root), options.threads)
    print(
        f"{manifest.url}: {manifest.num_samples} samples in {manifest.num_shards} shards, "
        f"{manifest.tar_bytes.sum() / 1e9:.2f} GB, digest {manifest.digest}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
