"""The `audiosep` command: one subcommand for each thing a user does, imported only when it is asked for."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "index": "tars of audio and captions into a catalogue",
    "check": "catalogues of splits, for clips that are twice in them",
    "precompute": "clip catalogues into STFT shards",
    "train": "shards into a model; the same command resumes",
    "evaluate": "a checkpoint's SDR, SDRi, SI-SDR and SI-SDRi on shards or benchmark folders",
    "separate": "one mixture and a query into the sound that the query describes",
    "explain": "how one sample was made, rendered again from its clips",
    "report": "what is in a data set, as one HTML page",
    "demo": "the whole way on the bundled audio",
}

INTERRUPTED = 130  # as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `audiosep COMMAND ...`.

    A failure that a user can act on is one message on stderr and exit status 2; Ctrl-C is 130, where the command has no
    status of its own for it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:11} {meaning}" for name, meaning in COMMANDS.items())
        print(f"usage: audiosep COMMAND ...\n\n{listing}\n\n`audiosep COMMAND --help` shows its config keys.")
        return 0
    command = words.pop(0)
    if command not in COMMANDS:
        print(f"audiosep: no such command; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"audiosep.{command}").main(words)
    except (ValueError, OSError, EOFError) as error:
        print(f"audiosep {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"audiosep {command}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
