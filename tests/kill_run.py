"""Kill `nmke run` on the embedded model, start it again, and compare what it leaves with a run that was let be: the same bits.

    python tests/kill_run.py                            60 edits, 25 random moments, every call that changes a file (under an hour)
    python tests/kill_run.py --edits 4 --moments 1      the same of 4 edits (4 minutes)
    python tests/kill_run.py --first 2 --stride 2       every second chain, for a process beside another

A stage is the number of complete lines in the state's index; in each, the calls that change files are numbered from 1. Chain j is
a run that is killed before call j of a stage, started again, killed before call j of the next stage that has as many, and so on to
its end; every other life of it is killed earlier, while it takes up what the one before left, if that takes enough calls. Chains
1, 2, 3 ... up to one in which nothing was killed leave out no call: they are compared with those of a run that was let be.

Every life is a process of its own, forked from this one, which has imported everything and computed nothing.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from easyedit_nmke import atlas, cli
from easyedit_nmke.experiments import protocol
from easyedit_nmke.scores import generation

SETTINGS = dict(
    alg_name="NMKE", model_name="atlas", device="cpu", layers=[0, 1], v_num_grad_steps=4, mom2_dataset="atlas", mom2_n_samples=200,
    v_lr=1.0, nullspace_fraction=0.9, L2=5, consolidate_every=2,
)  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc: memory is kept for what comes next, which saves a fifth of the time
TAKING_UP = 17  # calls until a run that is started again has added to the index
Point = tuple[int, int, str]  # stage, number, name of the call


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
        self.compare(name, self.start(name), how)

    def compare(self, name: str, status: int, how: str) -> None:
        """What a run left that ended with `status`; it is removed."""
        log = (self.folder / f"{name}.log").read_text()[-2000:]
        if status:
            raise SystemExit(f"killed {how}, the run could not be taken up again (status {status}):\n{log}")
        differ = [part for part, value in self.left("alone").items() if not same(value, self.left(name)[part])]
        if differ:
            raise SystemExit(f"killed {how}, the run ended with other {', '.join(differ)} ({self.folder / name}):\n{log}")
        shutil.rmtree(self.folder / name)
        (self.folder / f"{name}.log").unlink()

    def chain(self, number: int) -> tuple[set[Point], int]:
        """Chain `number`, compared at its end: what it was killed before, and how often it was killed while it took up."""
        killed: set[Point] = set()
        reached, early, taking_up = -1, 0, 0  # `reached` grows with every other life: the chain ends
        with tqdm(desc=f"chain {number}", unit="kill") as bar:
            while (status := self.start("chain", partial(watch, self.folder / "chain", reached, number, early))) == signal.SIGKILL:
                last = self.points("chain")[-1]
                if last[0] > reached:
                    killed.add(last)
                elif early:
                    taking_up += 1
                else:
                    raise SystemExit(f"the run was killed by something else, {last}")
                reached, early = last[0], 0 if early else 1 + (last[0] + number) % TAKING_UP
                bar.update()
        self.compare("chain", status, f"before call {number} of every stage")
        return killed, taking_up

    def points(self, name: str) -> list[Point]:
        """What `watch` wrote of the last life of a run."""
        lines = (line.split() for line in (self.folder / f"{name}.points").read_text().splitlines())
        return [(int(stage), int(number), call) for stage, number, call in lines]

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
            "records": [(record["kind"], record["digest"]) for record in index if "digest" in record],
        }


def same(one, other) -> bool:
    if isinstance(one, dict) and all(isinstance(value, torch.Tensor) for value in one.values()):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return json.dumps(one) == json.dumps(other)


def watch(out: Path, reached: int = -1, number: int = 0, early: int = 0) -> None:
    """Write down this process's calls that change files in `out`; kill it before call `number` of a stage after `reached`, or
    before call `early` if it is in none yet."""
    index, points = out / "state-NMKE-0" / "index.jsonl", out.with_suffix(".points").open("w", buffering=1)
    stage, calls = reached, 0

    def point(call):
        nonlocal stage, calls
        lines = index.read_bytes().count(b"\n") if index.exists() else 0
        stage, calls = (lines, 1) if lines > stage else (stage, calls + 1)
        points.write(f"{stage} {calls} {call}\n")
        if calls == (number if stage > reached else early):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if event in CHANGES or (event == "open" and args[2] & WRITES):
            path = args[0]
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(f"{out}"):
                point(event)

    def hooked(call):
        def run(file, *args):
            if file > 2:
                point(call.__name__)
            return call(file, *args)

        return run

    sys.addaudithook(audit)
    for name in ("write", "pwrite", "fsync", "ftruncate"):
        setattr(os, name, hooked(getattr(os, name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--moments", type=int, default=25, help="random moments (default 25)")
    parser.add_argument("--first", type=int, default=1, help="the first chain (default 1)")
    parser.add_argument("--last", type=int, help="the last (default: until nothing is killed)")
    parser.add_argument("--stride", type=int, default=1, help="every so many chains (default: each)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    folder = Path(tempfile.mkdtemp(prefix="kill_run"))
    runs, rng = Runs(folder, args.edits), random.Random(args.seed)
    atlas.load()  # what it imports is imported
    generation.ANSWER_TOKENS = protocol.FLUENCY_TOKENS = 3  # scores in a fraction of the time
    if runs.start("alone"):
        raise SystemExit((folder / "alone.log").read_text())
    started = time.perf_counter()
    runs.compare("again", runs.start("again", partial(watch, folder / "again")), "never")
    took = time.perf_counter() - started
    for _ in tqdm(range(args.moments), desc="moments"):
        moment = rng.uniform(0, took)
        runs.start("moment", after=moment)
        runs.finish("moment", f"after {moment:.2f} s")
    killed, taking_up = set(), 0
    numbers = range(args.first, (args.last or 10**6) + 1, args.stride)
    for number in numbers:
        points, early = runs.chain(number)
        if not points:
            break
        killed, taking_up = killed | points, taking_up + early
    missed = sorted({point for point in runs.points("again") if point[1] in numbers} - killed)
    if missed:
        raise SystemExit(f"{len(missed)} calls were not killed at (stage, number, call): {missed}")
    shutil.rmtree(folder)
    tqdm.write(
        f"{args.edits} edits: killed at {args.moments} moments, {len(killed)} calls and {taking_up} times while taking up, "
        "always the same bits"
    )


if __name__ == "__main__":
    main()
