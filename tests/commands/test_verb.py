"""What verbs share: words before and behind flags, and what a mistake ends in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from composer_path.commands.verb import exit_code, parse


@pytest.mark.parametrize("verb", ["check", "train", "plan", "lengths"])
@pytest.mark.parametrize("place", range(4))
def test_overrides_stand_before_and_behind_flags(verb: str, place: int) -> None:
    flags = {"check": ["--files"], "train": ["--check"], "plan": ["--gpus", "8"], "lengths": ["--force"]}[verb]
    words = ["x.yaml", "a=1", "b=2"]
    options = parse(verb, [*words[:place], *flags, *words[place:]])
    assert (options.yaml, options.words) == ("x.yaml", ["a=1", "b=2"])


def test_overrides_of_encode_stand_anywhere_behind_its_places() -> None:
    options = parse("encode", ["x.yaml", "--device", "cpu", "set", "new", "a=1", "--workers", "2", "b=2"])
    assert (options.shards, options.out, options.words, options.workers) == ("set", "new", ["a=1", "b=2"], 2)


@pytest.mark.parametrize("words", [["x.yaml", "--chek"], ["x.yaml", "--gpus"], ["--gpus", "8"]])
def test_a_wrong_flag_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parse("plan", words)
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("composer-path plan: ") and error.count("\n") == 1


def ours() -> int:
    from composer_path.config.reading import load_config

    load_config("none.yaml")
    return 0


def full_disk() -> int:
    raise OSError(28, "No space left on device")


def missing_file() -> int:
    return len(Path("/nowhere/x.json").read_text())


def interrupted() -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("work", "code", "printed"),
    [
        (ours, 2, "composer-path ask: none.yaml: 1 problem\n"),
        (full_disk, 2, "composer-path ask: out: No space left on device\n"),
        (missing_file, 2, "composer-path ask: /nowhere/x.json: No such file or directory\n"),
        (interrupted, 130, "\n"),
    ],
)
def test_a_mistake_is_a_line_and_an_exit_code(
    work: Callable[[], int], code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(work, "ask", "out") == code
    assert capsys.readouterr().err.startswith(printed)


def test_a_bug_shows_its_traceback() -> None:
    with pytest.raises(KeyError):
        exit_code(lambda: {}["x"], "ask")


def test_of_a_run_only_what_we_refuse_ourselves_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(json.JSONDecodeError):
        exit_code(lambda: json.loads("{"), "train")
    assert exit_code(ours, "train") == 2 and "none.yaml: 1 problem" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 10_000])
def test_what_nobody_reads_ends_quietly(lines: int) -> None:
    """As shell tools before `| head`, whether it fits into a buffer or not; `--out` isn't blamed."""
    code = "import sys; from composer_path.commands.verb import exit_code\n"
    code += f"sys.exit(exit_code(lambda: print('line\\n' * {lines}) or 0, 'shards', 'out'))"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == (b"", 141)
    command.stderr.close()


def test_a_pipe_that_breaks_elsewhere_is_a_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    def connection_lost() -> int:
        raise BrokenPipeError(32, "Broken pipe", "socket")

    assert exit_code(connection_lost, "convert") == 2
    assert capfd.readouterr().err == "composer-path convert: socket: Broken pipe\n"


def test_ranks_that_do_not_come_are_a_mistake_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    class DistStoreError(RuntimeError):
        """As torch.distributed has it."""

    def wait() -> int:
        raise DistStoreError("Timed out after 11 seconds waiting for clients. 1/2 clients joined.")

    assert exit_code(wait, "train") == 2
    assert "1/2 clients joined. Start the same command on all nodes" in capsys.readouterr().err
