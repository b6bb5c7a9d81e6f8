"""What verbs share: words before and behind flags, and what a mistake ends in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from composer_path.commands.verb import mistakes, parse


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
    assert capsys.readouterr().err.startswith("usage: composer-path plan")


def ours() -> None:
    parse_nothing: dict[str, str] = {}
    if not parse_nothing:
        raise ValueError("x: must be y, found z; do w")


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def missing_file() -> None:
    Path("/nowhere/x.json").read_text()


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("action", "code", "printed"),
    [
        (ours, 2, "composer-path ask: x: must be y, found z; do w\n"),
        (full_disk, 2, "composer-path ask: out: No space left on device\n"),
        (missing_file, 2, "composer-path ask: /nowhere/x.json: No such file or directory\n"),
        (interrupted, 130, "\n"),
    ],
)
def test_a_mistake_is_a_line_and_an_exit_code(
    action: Callable[[], None], code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mistakes("ask", "out") as ending:
        action()
    assert ending.code == code
    assert capsys.readouterr().err == printed


def test_a_bug_shows_its_traceback() -> None:
    with pytest.raises(KeyError), mistakes("ask"):
        raise KeyError("x")


def test_of_a_run_only_what_we_refuse_ourselves_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(json.JSONDecodeError), mistakes("train", only_ours=True):
        json.loads("{")
    from composer_path.config.reading import load_config

    with mistakes("train", only_ours=True) as ending:
        load_config("none.yaml")
    assert ending.code == 2 and "none.yaml: 1 problem" in capsys.readouterr().err
