"""Stand-in for the commands that `slurm/` starts, which keeps their contract and needs no audio.

usage: standin.py precompute --config F (--plan | --shards 0,3,5) | train --config F | seal|verify|info ROOT
The config holds root, num_shards, seconds (for each shard) and optionally poison (a shard that fails) and luck (how
many times it fails)."""

import json
import signal
import sys
import time
from pathlib import Path

import yaml

stopped = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: stopped.append(True))

if sys.argv[1] in ("seal", "verify"):
    root = Path(sys.argv[2])
    (root / "manifest.json").write_text(json.dumps(sorted(path.name for path in root.glob("shard-*"))))
    sys.exit(0)

if sys.argv[1] == "info":
    missing = set(range(6)) - {int(path.name[6:]) for path in Path(sys.argv[2]).glob("shard-*")}
    print(json.dumps({"num_shards": 6, "missing_shards": ",".join(map(str, missing))}))
    sys.exit(0)

if sys.argv[1] == "train":
    print("trained")
    sys.exit(0)

config = yaml.safe_load(Path(sys.argv[3]).read_text())
root = Path(config["root"])
if "num_shards" not in config:
    print("num_shards is missing", file=sys.stderr)
    sys.exit(2)
files = [root / f"shard-{index:06d}" for index in range(config["num_shards"])]
if sys.argv[4] == "--plan":
    unfinished = [index for index, file in enumerate(files) if not file.exists()]
    print(
        json.dumps(
            {"root": str(root), "num_shards": len(files), "unfinished": unfinished, "spec_digest": "0", "storage": {}}
        )
    )
    sys.exit(0)
print("rendering", flush=True)  # signals are taken from here on
status = 0
for index in map(int, sys.argv[-1].split(",")):
    end = time.monotonic() + config["seconds"]
    while time.monotonic() < end and not files[index].exists():
        if stopped:
            sys.exit(75)
        time.sleep(0.02)
    failures = root / f"failures-{index}"
    root.mkdir(exist_ok=True)
    if index == config.get("poison") and len(failures.read_text() if failures.exists() else "") < config["luck"]:
        failures.open("a").write(".")
        print(f"shard-{index:06d} failed: clip bad.wav cannot be read", file=sys.stderr)
        status = 3
    else:
        files[index].write_text(str(index))
sys.exit(status)
