"""A picture that kills or holds its decoder is an error of that picture; the next one is examined all the same."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from odd_files import encode, tissue
from PIL import Image

from composer_path.conversion.convert import convert
from composer_path.conversion.options import ConvertOptions
from composer_path.conversion.rejected_file import ConvertError
from composer_path.images import examiner, forked
from composer_path.images.examiner import Examiner
from composer_path.images.memory import ImageMemory, memory_bytes
from composer_path.images.stored_square import Square
from composer_path.parallel import ProcessKilled
from composer_path.records.rules import ImageError

PNG, JPEG = encode(tissue(), "PNG"), encode(tissue(), "JPEG")
# Put before the process serves: what a decoder's mistake does to a picture of 13 x 13 pixels.
_FAULTY = """
import sys, os, time, signal
sys.path[:] = {path!r}
from composer_path.images import examining_process, file
def faulty(data, *arguments, **keywords):
    if file.open_image(data).size == (13, 13): FAULT
    return right(data, *arguments, **keywords)
right, examining_process.examine_image = examining_process.examine_image, faulty
examining_process.serve_forked({control})
"""
BAD = encode(Image.new("RGB", (13, 13)), "PNG")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Processes of this test alone."""
    end_all()
    yield
    end_all()


def end_all() -> None:
    while examiner._idle:
        examiner._idle.pop().end()
    forked.end_source()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda code: monkeypatch.setattr(forked, "_CODE", _FAULTY.replace("FAULT", code))


CRASHES = {
    "os.kill(os.getpid(), signal.SIGSEGV)": "SIGSEGV",
    "os.abort()": "SIGABRT",
    "os.kill(os.getpid(), signal.SIGXCPU)": r"took more than \d+ s",
}


@pytest.mark.parametrize("code", CRASHES)
def test_a_crash_is_an_error_of_its_picture_and_of_no_other(fault: Callable[[str], None], code: str) -> None:
    fault(code)
    examine = Examiner().examine
    for _ in range(2):  # also in a process that has examined others
        assert examine(PNG).data == PNG
        with pytest.raises(ImageError, match=rf"{CRASHES[code]}.*\[unreadable-image\]"):
            examine(BAD)
    assert examine(PNG).data == PNG


def test_a_picture_over_which_a_decoder_stands_still_is_given_up(
    fault: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault("time.sleep(1000)")
    monkeypatch.setattr(examiner, "_STILL_SECONDS", 0.2)
    monkeypatch.setattr(examiner, "_LOOK_SECONDS", 0.1)
    process = examiner._Process()
    monkeypatch.setattr(examiner, "_LOOK_SECONDS", 5.0)  # it has to start first
    process.ask({"task": "check", "max_pixels": 2**28, "granted": 2**30}, PNG)
    examiner._idle.append(process)
    monkeypatch.setattr(examiner, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(examiner, "_STILL_SECONDS", 3.0)
    with pytest.raises(ImageError, match=r"stood still.*\[unreadable-image\]"):
        Examiner().examine(BAD)


def test_a_kill_from_outside_is_no_fault_of_a_picture(fault: Callable[[str], None]) -> None:
    fault("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ProcessKilled, match="perhaps for lack of memory"):
        Examiner().examine(BAD)
    once = Examiner()
    once.examine(PNG)
    os.kill(examiner._idle[0]._process.pid, signal.SIGKILL)
    assert once.examine(PNG).data == PNG


def test_many_are_forked_from_one_that_is_started_again_if_it_is_killed() -> None:
    first, second = examiner._Process(), examiner._Process()
    parents = {psutil.Process(one._process.pid).ppid() for one in (first, second)}
    assert parents == {forked._source[1].pid}
    os.kill(parents.pop(), signal.SIGKILL)
    for one in (first, second):  # they end with it
        assert one._process.wait() == -signal.SIGKILL
        one.end()
    assert Examiner().examine(PNG).data == PNG


def test_a_forked_process_shares_its_parents_and_outlives_them() -> None:
    assert Examiner().examine(PNG).data == PNG
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        found = Examiner().examine(JPEG).data == JPEG
        same = psutil.Process(examiner._idle[0]._process.pid).ppid() == forked._source[1].pid
        os.kill(forked._source[1].pid, signal.SIGKILL)
        os.write(write, bytes([found, same, Examiner().examine(JPEG).data == JPEG]))
        os._exit(0)
    assert os.read(read, 3) == b"\1\1\1"
    os.waitpid(pid, 0)
    os.close(read), os.close(write)
    assert Examiner().examine(PNG).data == PNG


def test_they_end_with_a_process_that_is_killed() -> None:
    code = (
        "import os, sys, time; from composer_path.images import examiner, forked\n"
        "print(examiner._Process()._process.pid, forked._source[1].pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        numbers = [int(number) for number in process.stdout.readline().split()]
        process.kill()
    end = time.monotonic() + 20
    while any(map(psutil.pid_exists, numbers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, numbers))


def test_a_conversion_names_the_record_that_crashes_and_writes_the_others(
    fault: Callable[[str], None], tmp_path: Path
) -> None:
    fault("os.abort()")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Tissue."}]
    for number, data in enumerate((PNG, BAD, JPEG)):
        (tmp_path / f"{number}.png").write_bytes(data)
    records = [{"image": f"{number}.png", "conversations": turns} for number in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    places = tmp_path / "data.json", tmp_path, tmp_path / "out"
    with pytest.raises(ConvertError, match=r"record 1: image 1 of 1: .*SIGABRT.*\[unreadable-image\]"):
        convert(*places)
    assert convert(*places, on_error="skip").records == 2


@pytest.mark.skipif(sys.platform != "linux", reason="a bound of memory is Linux's")
def test_a_picture_takes_no_more_memory_than_was_granted(fault: Callable[[str], None]) -> None:
    fault("taken = bytearray(4 * 2**30)")
    with pytest.raises(ImageError, match=r"takes more than 1024 MB.*\[too-large\]"):
        Examiner(ImageMemory(2**31)).examine(BAD)


def test_a_large_picture_waits_for_the_other_half_and_a_larger_one_is_refused() -> None:
    large = encode(Image.new("L", (4096, 4096)), "PNG")  # 134 MB
    assert Examiner(ImageMemory(2**29, num_processes=64)).examine(large).data == large
    with pytest.raises(ImageError, match=r"found one that takes 128 MB to decode.*\[too-large\]"):
        Examiner(ImageMemory(2**27)).examine(large)


def test_sizes_of_memory_have_a_unit_and_options_are_refused() -> None:
    assert memory_bytes("1.5gb") == 3 * 2**29
    for given in ("1", "100mb", "4tb", "-1gb", "nan gb"):
        with pytest.raises(ConvertError, match="--image-memory: must be a size"):
            ConvertOptions(image_memory=given)
    for given in (0, -5):
        with pytest.raises(ConvertError, match="--max-pixels: must be 1 or more"):
            ConvertOptions(max_pixels=given)


def test_a_square_is_the_one_that_this_process_would_make() -> None:
    from stored_images import resize_image

    for data in (PNG, JPEG, encode(tissue(), "TIFF")):
        square = Examiner().examine(data, square=Square.of(32, "pad", (1, 2, 3))).data
        assert square == resize_image(data, 32, pad_color=(1, 2, 3))
    assert np.frombuffer(square, np.uint8).size == 16 + 3 * 32 * 32


_CONVERT = """
import resource, sys, psutil, threading, time
from composer_path.conversion.convert import convert
peak, done = 0, threading.Event()
def watch():
    global peak
    me = psutil.Process()
    while not done.wait(0.02):
        total = 0
        for one in [me, *me.children(recursive=True)]:
            try: total += one.memory_info().rss
            except psutil.NoSuchProcess: pass
        peak = max(peak, total)
thread = threading.Thread(target=watch); thread.start()
print(convert(sys.argv[1] + "/data.json", sys.argv[1], sys.argv[1] + "/out", image_memory="5gb").images)
done.set(); thread.join(); print(peak)
"""


def test_a_turned_jpeg_is_granted_what_it_takes() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encode(tissue(7000, 7000), "JPEG", exif=turned)
    crowded = Examiner(ImageMemory(8 * 2**30, num_processes=64))  # as on a machine of many cores
    with Image.open(io.BytesIO(crowded.examine(data).data)) as stored:
        assert stored.size == (7000, 7000)


@pytest.mark.slow
def test_a_large_picture_with_alpha_is_granted_what_it_takes() -> None:
    data = encode(Image.new("RGBA", (16384, 16384), (200, 150, 180, 90)), "PNG")
    crowded = Examiner(ImageMemory(8 * 2**30, num_processes=64))
    assert crowded.examine(data).oddities == ["one_color"]


@pytest.mark.slow
def test_six_large_pictures_of_a_record_take_the_memory_of_one(tmp_path: Path) -> None:
    large = encode(Image.new("RGB", (16384, 16384), (200, 150, 180)), "PNG")
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(large)
    turns = [{"from": "human", "value": "<image>" * 6 + "What?"}, {"from": "gpt", "value": "Tissue."}]
    records = [{"image": [f"{number}.png" for number in range(6)], "conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    command = [sys.executable, "-c", _CONVERT, str(tmp_path)]
    images, peak = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert int(images) == 6
    assert int(peak) < 1.5e9, peak  # 4 bytes a pixel are 1.07 GB
