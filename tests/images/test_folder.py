"""Image names lead to files of the image folder, and to nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_path.images.folder import resolve_image
from composer_path.records.rules import RecordError


def test_image_names_resolve_inside_the_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "imgs"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.jpg").write_bytes(b"x")
    (tmp_path / "outside.jpg").write_bytes(b"x")
    (folder / "out.jpg").symlink_to("../outside.jpg")
    (folder / "in.jpg").symlink_to("sub/a b.jpg")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "alias").symlink_to(folder)

    assert resolve_image("sub/a b.jpg", folder) == (folder / "sub" / "a b.jpg").resolve()
    assert resolve_image("in.jpg", tmp_path / "alias") == (folder / "sub" / "a b.jpg").resolve()
    outside = ["../outside.jpg", "sub/../in.jpg", "..\\outside.jpg", str(folder / "in.jpg"), "C:\\a.jpg"]
    for name in [*outside, "out.jpg", "out/outside.jpg", "out/no_such_file.jpg"]:
        with pytest.raises(RecordError) as caught:
            resolve_image(name, folder)
        assert caught.value.rule == "path-outside-folder", name
    for name in ["b.jpg", "sub", "", "loop.jpg", "a\0b", "x" * 5000]:
        with pytest.raises(RecordError) as caught:
            resolve_image(name, folder)
        assert caught.value.rule == "missing-file", name
