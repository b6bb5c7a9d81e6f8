"""The layouts by name, and which of them a row is of.

`auto` looks at the keys of each row. It takes a layout only where no other fits as well; what it doesn't know, or what
can't be trained on, is refused with what it looks like: never with a value, nor with a key that no layout has.

To add one: a function beside those of its kind, and its line in `_LAYOUTS`. Questions that are only asked need none:
see asking/closed_questions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer_path.layouts.captions import arch, captions, pathgen, quilt, reg_report
from composer_path.layouts.conversations import has_roles, llava, messages
from composer_path.layouts.own import own_layouts, read_by_own
from composer_path.layouts.questions import pathmmu, pmc_vqa, questions, reg_chain, vlmevalkit
from composer_path.layouts.row import CAPTION_KEYS, IMAGE_KEYS, Row, plain_key
from composer_path.records.rules import RECORD_KEYS, RecordError

Reader = Callable[[Row, Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """One way to write records down.

    Attributes:
        name: Its word for `--layout`.
        read: Makes a plain record of a row. A `RecordError` says what is wrong with the row.
        needs: Keys that make it known; of several in one entry one is enough.
        sets: Public sets that come so; their names are understood, too.
        without: Keys that it never has.
    """

    name: str
    read: Reader
    needs: tuple[tuple[str, ...], ...]
    sets: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def fits(self, keys: Collection[str]) -> bool:
        """Whether plain keys hold what makes it known."""
        found = all(any(plain_key(key) in keys for key in one_of) for one_of in self.needs)
        return found and not any(plain_key(key) in keys for key in self.without)

    def known_by(self, keys: Collection[str]) -> set[str]:
        """Return those of some plain keys that make it known."""
        return {plain_key(key) for one_of in self.needs for key in one_of} & set(keys)


def _needs(*keys: str | tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple((key,) if isinstance(key, str) else key for key in keys)


_LAYOUTS = (
    Layout("llava", llava, _needs("conversations"), ("sharegpt", "quilt-instruct", "pathgen-instruct")),
    Layout("messages", messages, _needs("messages"), ("openai", "ms-swift", "trl")),
    Layout("captions", captions, _needs(IMAGE_KEYS, CAPTION_KEYS), ("pmc-oa", "medtrinity")),
    Layout("pathgen", pathgen, _needs("wsi_id", "position", "caption"), ("pathgen-1.6m",)),
    Layout("quilt-1m", quilt, _needs("image_path", "caption", "subset")),
    Layout("arch", arch, _needs("uuid", "figure_id", "caption")),
    Layout("questions", questions, _needs(IMAGE_KEYS, "question", "answer"), ("pathvqa",)),
    Layout("pmc-vqa", pmc_vqa, _needs("Figure_path", "Question", ("Answer", "Answer_label"), "Choice A")),
    Layout("pathmmu", pathmmu, _needs(("img", "source_img"), "question", "options", "answer")),
    Layout("vlmevalkit", vlmevalkit, _needs("index", ("image", "image_path"), "question", "A", "B", "answer")),
    Layout("reg", reg_report, _needs("id", "report"), without=IMAGE_KEYS),
    Layout("reg-chains", reg_chain, _needs("id", "chain_of_thought"), without=IMAGE_KEYS),
)
LAYOUTS = {layout.name: layout for layout in _LAYOUTS}
LAYOUT_NAMES = ("auto", *LAYOUTS)
SET_NAMES = {name: layout.name for layout in _LAYOUTS for name in layout.sets}

_FEATURES = "its pictures are features of slides, which can't be trained on yet"
# Known, and refused by name: what they hold as pictures, or are meant for, is not what a set for training needs.
_REFUSED: dict[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "WSI-VQA": (_needs("Id", "Question", "Choice", "Answer"), _FEATURES),
    "SlideBench": (_needs("Slide", "Question", "A", "B", "Answer"), _FEATURES),
    "MultiPathQA": (_needs("benchmark_name", "prompt", "answer"), "it is for evaluation only"),
}
# Endings of the pictures of WSI-Bench (.pt), SlideChat (.csv), TRIDENT and CLAM (.h5).
_FEATURE_ENDINGS = (".pt", ".pth", ".csv", ".h5", ".hdf5", ".npy", ".npz", ".pkl")

READABLE = "readable are " + ", ".join(LAYOUTS) + "; docs/data.md says which keys each has"
# A row without these would be refused for lacking them; another spelling of them is named by the rules of a record.
_OUR_KEYS = {plain_key(key) for key in RECORD_KEYS}
_SHOWN_KEYS = {plain_key(key): key for one in _LAYOUTS for one_of in one.needs for key in one_of if len(key) > 1}
_SHOWN_KEYS |= {plain_key(key): key for key in RECORD_KEYS}


def read_row(row: Row, layout: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Make a plain record of a row, by the layout of a name or, with `auto`, by the one its keys are of.

    Raises:
        RecordError: 'unknown-layout', 'unsupported-layout', or what is wrong with the row.
    """
    if layout in own_layouts():
        row.layout = layout
        record = read_by_own(layout, row, prompts)
    else:
        chosen = LAYOUTS[layout] if layout != "auto" else recognise(row.values)
        row.layout = chosen.name
        record = chosen.read(row, prompts)
    image = record.get("image")
    for one in image if isinstance(image, list) else [image]:
        if isinstance(one, str) and one.lower().endswith(_FEATURE_ENDINGS) and one not in row.embedded:
            fix = "leave it out, or give pictures"
            raise RecordError("unsupported-layout", "features of a slide (WSI-Bench, SlideChat) as image", fix, "image")
    return record


def recognise(row: Mapping[str, Any]) -> Layout:
    """Return the layout of a row's keys; null counts as absent.

    Raises:
        RecordError: None fits, or several that say different things of it.
    """
    keys = {plain_key(key) for key, value in row.items() if value is not None}
    for name, (needs, why) in _REFUSED.items():
        without = IMAGE_KEYS if why is _FEATURES else ()
        if Layout(name, llava, needs, without=without).fits(keys):
            raise RecordError("unsupported-layout", f"{name}: {why}", "leave it out")
    if "conversations" in keys and "messages" in keys:
        fix = "leave one of them, or choose with --layout"
        raise RecordError("unknown-layout", "'conversations' and 'messages' in one record", fix)
    if "messages" in keys:
        return LAYOUTS["messages"]
    if "conversations" in keys:  # whatever else it says of itself is a record's own affair, and counted
        return LAYOUTS["messages" if has_roles(row.get("conversations")) else "llava"]
    fitting = [layout for layout in _LAYOUTS if layout.fits(keys)]
    closest = [one for one in fitting if all(_is_covered(other, one, keys) for other in fitting)]
    if closest:
        return closest[0]
    if fitting:
        fix = "choose one with --layout"
        raise RecordError("unknown-layout", "keys of " + " and ".join(one.name for one in fitting), fix)
    if keys <= _OUR_KEYS or any(key.startswith(("conversation", "message")) for key in keys):
        return LAYOUTS["llava"]  # whose rules say what is missing
    raise RecordError("unknown-layout", looks_like(row), READABLE)


def looks_like(keys: Collection[str]) -> str:
    """Say which keys something has, of those that a layout has; the others may be names or sentences."""
    shown = list(dict.fromkeys(_SHOWN_KEYS[plain_key(key)] for key in keys if plain_key(key) in _SHOWN_KEYS))
    others = len(keys) - len(shown)
    named = "the keys " + ", ".join(shown) if shown else "no known key"
    return f"{named} and {others} other{'s' if others != 1 else ''}" if others else named


def _is_covered(other: Layout, layout: Layout, keys: Collection[str]) -> bool:
    """Whether a layout asks for all that makes another one known, of the keys that are there."""
    return other.known_by(keys) <= layout.known_by(keys)
