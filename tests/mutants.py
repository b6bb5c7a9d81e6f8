"""Would the tests notice? One line of the package is broken at a time, and only the tests beside it are run.

`python -m tests.mutants` goes through all in a copy of the checkout, at most five minutes each, and writes
benchmarks/results/mutants.json: for each mutant whether a test failed. `--check` only looks whether every line that is
to be broken is there once; `--only TEXT` takes those whose file holds the text.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
COPIED = ("composer_path", "tests", "test_data", "yamls", "data_prep", "docs", "benchmarks")
SECONDS = 300
# Imported once; a mutant's tests run in a fork. None of ours: they are what is broken.
PRELOADED = ("torch", "transformers", "composer", "streaming", "timm", "open_clip", "pytest")


@dataclass(frozen=True)
class Mutant:
    """A line of the package, what stands there instead, and the tests that should see it.

    Attributes:
        file: In composer_path.
        old: What stands there, once.
        new: What shall stand there.
        tests: In tests; files, or one test by its node id.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _mutants(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, old, new, tuple(tests.split())) for old, new in changes]


MUTANTS = [
    *_mutants(
        "records/tokenize.py",
        "records/test_tokenize.py records/test_reference_rules.py",
        ("labels += ids if weight else [IGNORE_INDEX] * len(ids)", "labels += ids"),
        ("ids = ids[:room]", "ids = ids[: room + 1]"),
    ),
    *_mutants(
        "records/prompts.py",
        "records/test_prompts.py records/test_reference_rules.py",
        ('Text(f" {turn.text} ", True, turn.weight)', 'Text(f" {turn.text}", True, turn.weight)'),
    ),
    *_mutants(
        "records/segments.py",
        "records/test_prompts.py records/test_reference_rules.py",
        ('rest = as_written("".join(parts)).strip()', 'rest = as_written("".join(parts))'),
    ),
    *_mutants(
        "records/conversation.py",
        "records/test_conversation.py",
        ('dropped_turns = int(turns[0].role == "assistant")', "dropped_turns = 0"),
        ("if num_tags != num_images:", "if num_tags > num_images:"),
    ),
    *_mutants(
        "images/fitting.py",
        "images/test_pixels.py",
        ("((side - image.width) // 2, (side - image.height) // 2)", "((side - image.width) // 2, 0)"),
        (
            "return image_size, int(image_size * height / width)",
            "return image_size, round(image_size * height / width)",
        ),
    ),
    *_mutants(
        "images/stored_square.py",
        "images/test_stored_square.py",
        ("len(data) != _HEADER.size + 3 * side * side", "len(data) < _HEADER.size + 3 * side * side"),
        ("if found != wanted:", "if found.image_size != wanted.image_size:"),
    ),
    *_mutants(
        "images/jpeg.py",
        "images/test_jpeg.py",
        ("if any(lowest.any() for lowest in self._lowest_bits.values()):", "if False:"),
        ("self._lowest_bits[name][first : last + 1] = bits & 15", "self._lowest_bits[name][first : last + 1] = 0"),
    ),
    *_mutants(
        "shards/mds.py",
        "shards/test_mds.py shards/test_writer.py stream/test_open_shards.py",
        (
            "return 4 + 4 * (num_samples + 1) + len(self._settings_bytes)",
            "return 4 * (num_samples + 1) + len(self._settings_bytes)",
        ),
        ("places[-1] != self._size or sorted(places) != places", "sorted(places) != places"),
    ),
    *_mutants(
        "shards/writer.py",
        "shards/test_mds.py shards/test_writer.py",
        (
            "if self._samples and size > self._format.size_limit:",
            "if self._samples and size >= self._format.size_limit:",
        ),
        ("if (found_size, found_hash) != (size, xxh64):", "if found_size != size:"),
    ),
    *_mutants(
        "shards/select.py",
        "shards/test_select.py",
        ('return equal == (self.operator == "=")', "return equal"),
        (
            "positions = sorted(random.Random(seed).sample(positions, num_samples))",
            "positions = positions[:num_samples]",
        ),
    ),
    *_mutants(
        "conversion/identifiers.py",
        "conversion/test_conversion_road.py commands/test_convert.py",
        ('message = f"{kind}\\0{value}".encode()', "message = value.encode()"),
        ("write_whole(self.path, write, mode=0o600)", "write_whole(self.path, write)"),
    ),
    *_mutants(
        "storage/errors.py",
        "storage/test_errors.py storage/test_places.py",
        ('_SECRET_NAMES = ("KEY", "SECRET", "TOKEN", "PASSW")', '_SECRET_NAMES = ("KEY", "TOKEN", "PASSW")'),
        ("if status in (401, 403):", "if status == 403:"),
    ),
    *_mutants(
        "storage/transfer.py",
        "storage/test_transfer.py",
        ('if found not in (str(wanted), "0"):', "if False:"),
        ("if (first := answer.first(arrived)) != arrived:", "if (first := answer.first(arrived)) > arrived:"),
    ),
    *_mutants(
        "stream/cache.py",
        "stream/test_guarded.py",
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        (
            "changed = [name for name, content in before.items() if after.get(name) != content]",
            "changed = [name for name in before if name not in after]",
        ),
    ),
    *_mutants(
        "batches/microbatches.py",
        "batches/test_microbatches.py",
        (
            "if total + lengths[index] <= limit), len(bins))",
            "if total + lengths[index] < limit), len(bins))",
        ),
        ("bins = tight  # evening out broke the limit", "pass  # evening out broke the limit"),
    ),
    *_mutants(
        "batches/balance.py",
        "batches/test_balance.py",
        ("at = np.flatnonzero(left[rows, best] < gap)", "at = np.flatnonzero(left[rows, best] <= gap)"),
        (
            "loads = np.where(steps >= 0, tokens[np.maximum(sample_of(steps), 0)], 0).sum(",
            "loads = tokens[np.maximum(sample_of(steps), 0)].sum(",
        ),
    ),
    *_mutants(
        "batches/loader.py",
        "batches/test_loader.py",
        ("max_tokens_per_microbatch < longest:", "max_tokens_per_microbatch <= longest:"),
        ("drop_last: bool = False,", "drop_last: bool = True,"),
    ),
    *_mutants(
        "models/composer_model.py",
        "models/test_composer_model.py",
        ("return weighted.sum() / (batch.loss_weight or 1.0)", "return weighted.mean()"),
        ("self.count += losses.numel()", "self.count += 1"),
    ),
    *_mutants(
        "models/attention.py",
        "models/test_attention.py",
        (
            "window = None if window is None or window >= max_length else int(window)",
            "window = None",
        ),
        ("missing = -inputs_embeds.shape[0] % multiple", "missing = inputs_embeds.shape[0] % multiple"),
    ),
    *_mutants(
        "run/optimizer.py",
        "run/test_optimizer.py",
        ('"weight_decay": 0.0 if still else decay', '"weight_decay": decay'),
        (
            "rates = lr if isinstance(lr, Mapping) else dict.fromkeys(MODULES, lr)",
            "rates = dict.fromkeys(MODULES, max(lr.values()) if isinstance(lr, Mapping) else lr)",
        ),
    ),
    *_mutants(
        "asking/closed_questions.py",
        "asking/test_closed_questions.py",
        (
            "same = (question.turns, question.system, len(question.images), longest)",
            "same = (question.turns, len(question.images), longest)",
        ),
        ("return found[0] if len(found) == 1 else None", "return found[0] if found else None"),
    ),
]


def check() -> list[str]:
    """What is wrong with the list: lines that aren't there once, tests that don't exist."""
    problems = []
    for mutant in MUTANTS:
        times = (ROOT / "composer_path" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        problems += [f"{mutant.file}: found {times} times: {mutant.old}"] if times != 1 else []
        missing = [test for test in mutant.tests if not (ROOT / "tests" / test.partition("::")[0]).exists()]
        problems += [f"{mutant.file}: there is no tests/{test}" for test in missing]
    if len(MUTANTS) < 40 or len({mutant.file for mutant in MUTANTS}) < 20:
        problems.append(
            f"{len(MUTANTS)} mutants of {len({mutant.file for mutant in MUTANTS})} modules; 40 of 20 are due"
        )
    return problems


def survives(mutant: Mutant, copy: Path) -> bool:
    """Break the line in the copy, run its tests in a fork of this process, and mend it."""
    path = copy / "composer_path" / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # a mutant that hangs is noticed, too
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        import pytest

        words = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*words, *(str(copy / "tests" / test) for test in mutant.tests)]))
    _, status = os.waitpid(child, 0)
    path.write_text(whole, encoding="utf-8")
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1, -signal.SIGALRM):
        raise RuntimeError(f"{mutant.file}: pytest ended with {code}:\n" + (copy / "log").read_text()[-3000:])
    return code == 0


def main() -> int:
    """Go through the list; 0 if at most six survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look whether the list fits the code")
    parser.add_argument("--only", default="", help="of the mutants, those whose file holds this text")
    options = parser.parse_args()
    if problems := check():
        print("\n".join(problems), file=sys.stderr)
        return 2
    if options.check:
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        importlib.import_module(name)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
        for path in ROOT.iterdir():
            if path.is_file() and path.name != ".git":
                shutil.copy(path, copy)
        for mutant in (mutant for mutant in MUTANTS if options.only in mutant.file):
            start = time.monotonic()
            outcome = "survived" if survives(mutant, copy) else "killed"
            outcomes.append({"file": mutant.file, "old": mutant.old, "new": mutant.new, "outcome": outcome})
            print(f"{outcome:8} {time.monotonic() - start:5.0f} s  {mutant.file}: {mutant.new}", flush=True)
    survivors = sum(outcome["outcome"] == "survived" for outcome in outcomes)
    print(f"{len(outcomes) - survivors} of {len(outcomes)} killed")
    if not options.only:
        summary = {"mutants": len(outcomes), "killed": len(outcomes) - survivors, "list": outcomes}
        RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return int(survivors > 6)


if __name__ == "__main__":
    sys.exit(main())
