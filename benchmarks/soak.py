"""Does a run survive? Kills at random and at the worst moments, damage, a full disk, other numbers of ranks.

Each trial is a tiny run (tests/tiny_run.py) that is killed some times, each time started again by the same command, and
compared with the undisturbed one: weights bit for bit, samples and losses of every step.

    PYTHONPATH=tests python -m benchmarks.soak [--kills 100] [--short]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from tiny_run import convert_shards
from warm_process import popen

from benchmarks.measure import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
COMMON = (
    *("trainer.save_interval=1ba", "trainer.save_num_checkpoints_to_keep=2", "trainer.eval_interval=2ba"),
    *("callbacks={save_weights: {interval: 99ep}}", "model.projector.weights=null", "loggers=null"),
    "trainer.dist_timeout=60",
)
MIXTURE = (
    "train_loader.dataset.local=null",
    "train_loader.dataset.streams={a: {local: SHARDS/train}, b: {local: SHARDS/text, loss_weight: 0.5}}",
)
KINDS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "stage 1, 1 rank": ("pretrain", 1, ()),
    "stage 1, 2 ranks": ("pretrain", 2, ("trainer.parallelism_config=null",)),
    "stage 2, 1 rank, mixture": ("finetune", 1, (*MIXTURE, "train_loader.num_workers=1")),
    "stage 2, 2 ranks": ("finetune", 2, ()),
}
MOMENTS = {"write": 6, "fsync": 12, "rename": 6, "evaluation": 4, "epoch": 2}  # and how often at most


class Trial:
    """One run's folder, and the commands that are given in it."""

    def __init__(self, folder: Path, shards: Path, kind: str, root: Path | None = None) -> None:
        self.stage, self.ranks, more = KINDS[kind]
        self.folder, self.root = folder, root or folder / "runs"
        self.notes = folder / "notes"
        self.notes.mkdir(parents=True, exist_ok=True)
        (folder / "tmp").mkdir(exist_ok=True)
        overrides = [word.replace("SHARDS", str(shards)) for word in (*COMMON, *more)]
        self.plan = {"stage": self.stage, "shards": str(shards), "root": str(self.root), "overrides": overrides}

    def start(self, kill: list[Any] | None = None, ranks: int | None = None, pause: float = 0.0) -> subprocess.Popen:
        """Give the command."""
        for note in self.notes.glob("step-*"):
            note.unlink()
        plan = {**self.plan, "notes": str(self.notes), "kill": kill, "pause": pause}
        plan["first_shared_memory"] = 200_000 + os.getpid() % 600_000
        (self.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        ranks = ranks or self.ranks
        launched = ["-m", "composer.cli.launcher", "-n", str(ranks)] if ranks > 1 else []
        words = [sys.executable, *launched, str(ROOT / "tests" / "soak_run.py"), str(self.folder / "plan.json")]
        self.log = (self.folder / "log").open("a")
        environment = os.environ | {"TMPDIR": str(self.folder / "tmp"), "OMP_NUM_THREADS": "1"}
        return popen(words, stdout=self.log, stderr=self.log, start_new_session=True, env=environment)

    def end(self, process: subprocess.Popen, seconds: float = 180) -> int:
        """Wait for its end; nothing of its group is left."""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{self.folder}: no end within {seconds} s") from None
        finally:
            self.log.close()
        deadline = time.monotonic() + 20
        while _group_lives(process.pid):
            assert time.monotonic() < deadline, f"{self.folder}: processes of the run outlive it"
            time.sleep(0.05)
        return code

    def run(self, **more: Any) -> int:
        """Give the command and wait for its end."""
        return self.end(self.start(**more))

    def kill_after(self, seconds: float, pause: float) -> bool:
        """Kill the group so long after its first step; whether it was still there."""
        process = self.start(pause=pause)
        deadline = time.monotonic() + 120
        while process.poll() is None and not any(self.notes.glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
        self.end(process)
        return killed

    def outcome(self) -> dict[str, Any]:
        """Hash of the trained weights; samples of all ranks and the loss of each step, as it was done last."""
        folder = self.root / self.stage
        path = folder / ("projector.safetensors" if self.stage == "pretrain" else "model/model.safetensors")
        steps: dict[int, list[int]] = {}
        losses: dict[int, float] = {}
        for note in sorted(self.notes.glob("rank*.jsonl")):
            of_rank = {}
            for line in note.read_text().splitlines():
                found = json.loads(line)
                of_rank[found["step"]] = found
            for step, found in of_rank.items():
                steps[step] = sorted(steps.get(step, []) + [one for one in found["ids"] if one >= 0])
                losses[step] = found["loss"]
        weights = load_file(path)
        return {"weights": weights, "hash": _hash(weights), "samples": steps, "losses": losses}

    def logged(self) -> str:
        """What all its commands printed."""
        return (self.folder / "log").read_text()


def _hash(weights: dict[str, torch.Tensor]) -> str:
    state = xxhash.xxh64()
    for name in sorted(weights):
        state.update(name.encode() + weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def _same(trial: Trial, expected: dict[str, Any]) -> None:
    found = trial.outcome()
    for key in ("samples", "losses", "hash"):
        assert found[key] == expected[key], f"{trial.folder}: {key} differ from the undisturbed run's"


def kills(work: Path, shards: Path, undisturbed: dict[str, Any], count: int, seed: int) -> dict[str, Any]:
    """Kill runs until so many kills are done, each followed by the same command."""
    chance, done, trials = random.Random(seed), Counter[str](), Counter[str]()
    names: list[str] = []
    while sum(done.values()) < count:
        kind = list(KINDS)[sum(trials.values()) % len(KINDS)]
        trial = Trial(work / f"trial{sum(trials.values())}", shards, kind)
        for _ in range(chance.randint(2, 4)):
            if chance.random() < 0.64:
                if trial.kill_after(chance.uniform(0.0, 2.2), pause=0.3):
                    done["between the first step and the end"] += 1
            else:
                moment = chance.choice(list(MOMENTS))
                killed = trial.run(kill=[moment, chance.randint(1, MOMENTS[moment])]) != 0
                done[f"{moment}, in a save" if moment in ("write", "fsync", "rename") else moment] += killed
        code = trial.run()
        assert code == 0, f"{trial.folder}: exit {code}\n{trial.logged()[-3000:]}"
        _same(trial, undisturbed[kind])
        left = [path.name for path in trial.root.rglob("*.unfinished")] + os.listdir(trial.folder / "tmp")
        assert not left, f"{trial.folder}: left {left}"
        checkpoints = [path.name for path in (trial.root / trial.stage / "checkpoints").glob("ep*")]
        assert len(checkpoints) == 2, f"{trial.folder}: keeps {checkpoints}"
        trials[kind] += 1
        names = left_names(shards)
        assert not names, f"{trial.folder}: left in /dev/shm {names}"
        shutil.rmtree(trial.folder)
        print(f"{sum(done.values())} kills, {sum(trials.values())} runs", file=sys.stderr)
    return {"kills": dict(done), "runs": dict(trials), "names_left_in_dev_shm": len(names)}


def left_names(shards: Path) -> list[str]:
    """Shared memory of runs over these shards of which no process lives; who lives holds the owner's file."""
    memory, found = Path("/dev/shm"), []
    for words in memory.glob("*_locals"):
        number = words.name.removesuffix("locals")
        with suppress(OSError), open(memory / f"{number}owner", "rb") as owner:  # in use, or gone by now
            if os.fsencode(shards) in words.read_bytes():
                fcntl.flock(owner, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found += [path.name for path in memory.glob(f"{number}*")]
    return found


def other_ranks(work: Path, shards: Path, undisturbed: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Go on with other numbers of ranks: relative differences of losses, of all weights, of the worst tensor.

    AdamW divides by the gradient's own size, so a tensor whose gradients are nearly 0 shows rounding most.
    """
    found = {}
    expected = undisturbed["stage 2, 2 ranks"]
    for name, legs in {"1 to 2 to 1": [(1, 2), (2, 4), (1, None)], "4 to 2": [(4, 3), (2, None)]}.items():
        trial = Trial(work / name.replace(" ", "_"), shards, "stage 2, 2 ranks")
        for ranks, stop in legs:
            code = trial.run(kill=None if stop is None else ["step", stop], ranks=ranks)
            assert (code == 0) == (stop is None), f"{name}: {ranks} ranks ended with {code}\n{trial.logged()[-3000:]}"
        outcome = trial.outcome()
        assert outcome["samples"] == expected["samples"], f"{name}: other samples"
        before, after = ({key: value.double() for key, value in one["weights"].items()} for one in (expected, outcome))
        each = {
            key: ((after[key] - value).norm() / value.norm().clamp(min=1e-12)).item() for key, value in before.items()
        }
        whole = sum((after[key] - value).square().sum() for key, value in before.items()) ** 0.5
        losses = [abs(outcome["losses"][step] / loss - 1) for step, loss in expected["losses"].items()]
        of_all = (whole / sum(value.square().sum() for value in before.values()) ** 0.5).item()
        found[name] = {"losses": max(losses), "all weights": of_all, "worst tensor": max(each.values())}
        assert max(losses) < 1e-6 and of_all < 1e-6 and max(each.values()) < 1e-4, f"{name}: {found[name]}"
    return found


def damage(work: Path, shards: Path, undisturbed: dict[str, Any], count: int, seed: int) -> dict[str, int]:
    """Damage the newest checkpoint; the same command names it and ends as the undisturbed run."""
    chance, done = random.Random(seed), Counter[str]()
    for number in range(count):
        trial = Trial(work / f"damaged{number}", shards, list(KINDS)[(0, 2)[number % 2]])
        assert trial.run(kill=["step", 4]) != 0
        [newest] = [path for path in (trial.root / trial.stage / "checkpoints").glob("ep*-ba4")]
        path = chance.choice(sorted(newest.iterdir()))
        how = ["cut", "one bit", "emptied", "removed"][number % 4]
        data = bytearray(path.read_bytes())
        if how == "removed":
            path.unlink()
        else:
            if how == "one bit":
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data if how == "one bit" else data[: chance.randrange(len(data)) if how == "cut" else 0])
        code = trial.run()
        assert code == 0, f"{trial.folder}: exit {code}\n{trial.logged()[-3000:]}"
        words = trial.logged()
        named = "is damaged" in words or "was not complete" in words
        assert named and "after step 3" in words, f"{trial.folder}: {path.name} {how} wasn't named\n{words[-3000:]}"
        _same(trial, undisturbed[list(KINDS)[(0, 2)[number % 2]]])
        done[how] += 1
        shutil.rmtree(trial.folder)
    return dict(done)


def full_disk(work: Path, shards: Path) -> dict[str, Any]:
    """A small file system that is full in the third save: one message, the second checkpoint stays."""
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)], check=False).returncode:
        return {"skipped": "mounting isn't allowed here"}
    try:
        trial = Trial(work / "full", shards, "stage 2, 2 ranks", root=disk / "runs")
        code = trial.run(kill=["fill", 3])
        lines = [line for line in trial.logged().splitlines() if "composer-path train: " in line]
        names = {path.name for path in (disk / "runs" / "finetune" / "checkpoints").glob("*ep*")}
        assert (code, len(lines)) == (2, 1) and "Traceback" not in trial.logged(), trial.logged()[-3000:]
        assert len(names) == 2 and not any("unfinished" in name or "ba3" in name for name in names), names
        (disk / "runs" / "finetune" / "checkpoints" / "filler").unlink()
        assert trial.run() == 0, trial.logged()[-3000:]
        return {"exit": code, "message": lines[0].replace(str(work), "...")}
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def main() -> None:
    """Do it all and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--short", action="store_true", help="a tenth of it, and no file is written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # a process with threads can't be forked
    count = options.kills // 10 if options.short else options.kills
    work = Path(tempfile.mkdtemp(prefix="soak"))
    shards = convert_shards(work / "shards")
    undisturbed, start = {}, time.monotonic()
    for kind in KINDS:
        trial = Trial(work / "undisturbed" / KINDS[kind][0] / str(KINDS[kind][1]), shards, kind)
        assert trial.run() == 0, trial.logged()[-3000:]
        undisturbed[kind] = trial.outcome()
    figures: dict[str, Any] = {"seed": options.seed, "machine": machine()}
    figures |= kills(work, shards, undisturbed, count, options.seed)
    figures["other_ranks"] = other_ranks(work, shards, undisturbed)
    figures["damaged"] = damage(work, shards, undisturbed, 4 if options.short else 24, options.seed)
    figures["full_disk"] = full_disk(work, shards)
    figures["minutes"] = round((time.monotonic() - start) / 60, 1)
    text = json.dumps(figures, indent=1)
    print(text)
    if not options.short:
        RESULTS.write_text(text + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
