"""Kill `nmke run` on the embedded model, start it again, and compare what it leaves with a run that was let be: the same bits.

    python tests/kill_run.py                                    60 edits, 25 random moments, every call that changes a file (hours)
    python tests/kill_run.py --edits 2 --moments 1 --stride 17  what tests/test_kill.py does

Every run is a process of its own, forked from this one, which has imported everything and computed nothing.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from easyedit_nmke import atlas, cli, protocol

SETTINGS = dict(
    alg_name="NMKE", model_name="atlas", device="cpu", layers=[0, 1], v_num_grad_steps=4, mom2_dataset="atlas", mom2_n_samples=200,
    v_lr=1.0, nullspace_fraction=0.9, L2=5,
)  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Runs:
    """`nmke run` of the first facts of atlas, in folders below `folder`."""

    def __init__(self, folder: Path, edits: int):
        self.folder = folder
        settings, data = folder / "settings.yaml", folder / "data.json"
        settings.write_text(yaml.safe_dump({**SETTINGS, "stats_dir": str(folder / "stats")}))
        data.write_text(json.dumps(atlas.requests(edits)))
        checkpoints = ",".join(map(str, sorted({1, (edits + 1) // 2, edits})))
        self.command = ["run", "--hparams", str(settings), "--data", str(data), "--checkpoints", checkpoints, "--out"]

    def start(self, name: str, prepare=lambda: None, after: float | None = None) -> int:
        """Start or go on with the run `name`; its wait status. prepare: called in its process. after: seconds to its end."""
        child = os.fork()
        if child == 0:
            status = 70
            try:
                log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2)
                torch.set_num_threads(1)
                prepare()
                status = cli.main([*self.command, str(self.folder / name)])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def finish(self, name: str, how: str) -> None:
        """Go on with a run that was killed, and compare."""
        status = self.start(name)
        log = (self.folder / f"{name}.log").read_text()[-2000:]
        if status:
            raise SystemExit(f"killed {how}, the run could not be taken up again (status {status}):\n{log}")
        differ = [part for part, value in self.left("alone").items() if not same(value, self.left(name)[part])]
        if differ:
            raise SystemExit(f"killed {how}, the run ended with other {', '.join(differ)} ({self.folder / name}):\n{log}")
        shutil.rmtree(self.folder / name)
        (self.folder / f"{name}.log").unlink()

    def left(self, name: str) -> dict:
        """What a run left, but for the time it took and the memory."""
        out = self.folder / name
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        told = ("method", "seed", "checkpoint", "failed", "scores", "retention", "drift", "mask")
        index = [json.loads(line)["content"] for line in (out / "state-NMKE-0" / "index.jsonl").read_text().splitlines()]
        return {
            "weights": load_file(out / "edited-NMKE-0.safetensors"),
            "results": [{key: line.get(key) for key in told} for line in lines],
            "scores of edits": json.loads((out / "edits-NMKE-0.json").read_text()),
            "records": [(record["id"], record["digest"]) for record in index if record["kind"] == "edit"],
        }


def same(one, other) -> bool:
    if isinstance(one, dict) and all(isinstance(value, torch.Tensor) for value in one.values()):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return json.dumps(one) == json.dumps(other)


def die_at(number: int, folder: Path) -> None:
    """Kill this process before its call of this number, from 1, among those that change files in `folder`."""
    calls = 0

    def point():
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if event in CHANGES or (event == "open" and args[2] & WRITES):
            path = args[0]
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(folder)):
                point()

    def hooked(call):
        def run(file, *args):
            if file > 2:
                point()
            return call(file, *args)

        return run

    sys.addaudithook(audit)
    for name in ("write", "pwrite", "fsync", "ftruncate"):
        setattr(os, name, hooked(getattr(os, name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--moments", type=int, default=25, help="random moments (default 25)")
    parser.add_argument("--first", type=int, default=1, help="the first call that changes a file to be killed at (default 1)")
    parser.add_argument("--last", type=int, help="the last (default: the run's)")
    parser.add_argument("--stride", type=int, default=1, help="kill at every so many (default: at each)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_run"))
    runs, rng = Runs(folder, args.edits), random.Random(args.seed)
    atlas.load()  # what it imports is imported
    protocol.ANSWER_TOKENS = protocol.FLUENCY_TOKENS = 3  # scores in a fraction of the time
    if runs.start("alone"):
        raise SystemExit((folder / "alone.log").read_text())
    started = time.perf_counter()
    runs.finish("again", "never")
    took = time.perf_counter() - started
    for _ in tqdm(range(args.moments), desc="moments"):
        moment = rng.uniform(0, took)
        runs.start("moment", after=moment)
        runs.finish("moment", f"after {moment:.2f} s")
    numbers = range(args.first, (args.last or 10**6) + 1, args.stride)
    killed = 0
    for number in tqdm(numbers, desc="calls"):
        status = runs.start("call", lambda number=number: die_at(number, folder / "call"))
        runs.finish("call", f"before call {number}")
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    shutil.rmtree(folder)
    tqdm.write(f"{args.edits} edits: killed at {args.moments} moments and {killed} calls, always the same bits")


if __name__ == "__main__":
    main()
