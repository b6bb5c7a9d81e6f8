"""What a conversion says when Ctrl-C or a full disk ends it: the command that goes on."""

from __future__ import annotations

import pytest

from composer_path.commands.convert import convert_and_report


@pytest.mark.parametrize(("overwrite", "words"), [(False, "--resume"), (True, "--resume in place of --overwrite")])
@pytest.mark.parametrize(("ends", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)])
def test_the_command_that_goes_on_is_one_that_is_accepted(
    overwrite: bool, words: str, ends: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(progress: object) -> None:
        raise ends

    assert convert_and_report(work, "out", overwrite) == code  # type: ignore[arg-type]
    assert f"the same command with {words} goes on" in capsys.readouterr().err
