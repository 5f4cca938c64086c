"""Kill `nmke run` again and again, at random moments and at its writes, and compare what it ends with to a run that was left alone.

    python tests/kill_runs.py --edits 60 --kills 25 --points 40

Not part of the test suite: it starts a process for every kill. Exits with 1 when a single bit differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from easyedit_nmke import atlas

# Runs the shell command and kills its own process just before the N-th call that changes a file.
DYING = """
import os, signal, sys
from easyedit_nmke import cli
left = int(sys.argv[1])
def dying(call):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counted
for name in ("write", "fsync", "replace", "unlink", "ftruncate"):
    setattr(os, name, dying(getattr(os, name)))
sys.exit(cli.main(sys.argv[2:]))
"""


def start(arguments: list[str], point: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DYING, str(point), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def outcome(folder: Path) -> tuple[dict, list]:
    """Weights, and all scores."""
    lines = [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]
    kept = ("method", "checkpoint", "scores", "drift", "retention", "mask", "failed")
    return load_file(next(folder.glob("edited-*.safetensors"))), [{name: line.get(name) for name in kept} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--kills", type=int, default=25, help="at random moments")
    parser.add_argument(
        "--points", type=int, default=40, help="the first process dies at its first write, the next at its second, ..."
    )
    parser.add_argument("--hparams", default="atlas")
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    (home / "data.json").write_text(json.dumps(atlas.requests(args.edits, "test")))

    def command(folder: str) -> list[str]:
        steps = ",".join(str(max(1, args.edits * i // 3)) for i in (1, 2, 3))
        return [
            "run",
            "--hparams",
            args.hparams,
            "--data",
            str(home / "data.json"),
            "--out",
            str(home / folder),
            "--checkpoints",
            steps,
        ]

    began = time.perf_counter()
    alone = start(command("alone"))
    if alone.wait():
        sys.exit(alone.stderr.read().decode())
    seconds, chance = time.perf_counter() - began, random.Random(0)
    print(f"left alone: {seconds:.0f} s")
    expected, failures = outcome(home / "alone"), 0
    plans = {"moments": [0] * args.kills, "writes": list(range(1, args.points + 1))}
    for name, points in plans.items():
        killed = 0
        for point in points:
            process = start(command(name), point)
            if not point:
                time.sleep(chance.uniform(0, seconds / 2))
                process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        process = start(command(name))
        if process.wait():
            sys.exit(process.stderr.read().decode())
        weights, scores = outcome(home / name)
        same = all(tensor.equal(weights[key]) for key, tensor in expected[0].items()) and scores == expected[1]
        failures += not same
        print(f"{name}: killed {killed} times; weights and scores are {'the same to the bit' if same else 'NOT THE SAME'}")
    print(f"files in {home}")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    sys.exit(main())
