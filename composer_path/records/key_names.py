"""Names of keys: which are meant for another one, and which may be shown.

A key's name can hold what only a value should: a file may be keyed by patients' names. So a name that nothing reads
is shown only if all its words are harmless ones.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from functools import lru_cache

NOT_SHOWN = "(not a plain name)"
ROW_NUMBER = "(row number)"  # what a table's first column is called that has no name

# Words of which a shown key may be made; none is anybody's name, place or date.
_HARMLESS = """
a b c d h id ids w
annotation annotations answer answers answerable area aspect assistant attribute attributes audio augmented bbox
bboxes box boxes bytes caption captions category categories chain channel channels chat choice choices class classes
clean closed cls cmu cognitive cohort color comment comments complexity concept confidence content context
conversation conversations corrected cot count credit crop data dataset degree density depth description details
diagnosis dialog dialogue difficulty dim dimension domain dtype duration embedding end entities entity epoch error
evaluation example explanation extra feature features field figure file filename files fold format from full gold
grade grading group gt has hash height hint history human image images img imgs index indices info input
instruction instructions is item keywords kind label labels lang language layer layout length letter level levels
license list location loss magnification mask masks med max media meta metadata min modality mode model mpp multi
name names noise noisy normal note notes num number object objective observation offset open openpath option options
order organ organs origin original output overlap page parent part patch patches path paths pathology picture pixel
pixels pmc position positions preferred primary prompt prompts pubmed qa quality query question questions quilt
ratio rationale raw reasoning reference references region regions rejected relevance report request response
responses result results revision roi role round row sample sampled scale score scores seed segment sentence
sentences sequence set severity sex shape short single size skill slice slide source sources space specimen split
stage stain stains start state status step stop style sub subset subtask subtype summary synthetic system tag tags
target task tasks template temperature test text texts thinking thought tile tiles time timestamp title tokens tool
tools top topic total train turn turns type types umls unit units uri url urls usage use used user valid validation
value values verified version video videos view weight weights width window word words wsi x y z
"""
HARMLESS_WORDS = frozenset(_HARMLESS.split())

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
# An identifier that may be shown where what it names is kept anyway: no blanks, no run of digits.
_IDENTIFIER = re.compile(r"(?!.*\d{3})[A-Za-z_][A-Za-z0-9_.-]{0,39}")

_PICTURE = re.compile(
    r"(?:input|query|main|source|target|pathto|local)?"
    r"(?:image|img|picture|pic|photo|figure|video|audio|media|wsi|tile|patch|slide(?=path|file|url|name)|file(?=name|path))"
    r"s?(?:path|file|filename|name|url|uri|link|list|bytes|base64|b64|data|\d+)?s?"
)
_PICTURE_FILE = re.compile(
    r".*\.(?:png|jpe?g|jp2|j2k|tiff?|svs|ndpi|mrxs|scn|bif|vms|webp|bmp|gif|dcm|dicom|heic|avif|mp4)\s*", re.I | re.S
)
# What other layouts call a key of a record or turn, all in `canonical` spelling.
_RECORD_SYNONYMS = {
    **dict.fromkeys(
        ("conversation", "message", "messages", "dialog", "dialogs", "dialogue", "dialogues", "turns", "chat", "text"),
        "conversations",
    ),
    **dict.fromkeys(("systemprompt", "systemmessage", "systemtext", "sysprompt", "sys"), "system"),
}
_TURN_SYNONYMS = {
    **dict.fromkeys(("role", "speaker", "author"), "from"),
    **dict.fromkeys(("content", "text", "message", "utterance", "values"), "value"),
}
_FLAG_SYNONYMS = {
    **dict.fromkeys(("trainable", "trained", "learn", "supervise", "supervised", "istrain", "dotrain"), "train"),
    **dict.fromkeys(("mask", "masked", "ismasked", "ignore", "ignored", "skip", "nograd", "masklabel"), "loss_mask"),
    **dict.fromkeys(("weights", "lossweight", "lossweights", "tokenweight", "turnweight"), "weight"),
    **dict.fromkeys(("losses", "computeloss", "useloss", "hasloss", "calculateloss", "nolossmask"), "loss"),
}
# Words of other names of a flag, as in `train_on_turn` or `no_loss`; the latter ones where the value could be a flag's.
_FLAG_WORDS = frozenset(
    ("loss", "losses", "train", "trains", "trained", "training", "trainable", "supervise", "supervised", "supervision")
)
_FLAG_WORDS_OF_NUMBERS = frozenset(
    ("mask", "masks", "masked", "weight", "weights", "grad", "learn", "learned", "exclude")
)
_REGION_SYNONYMS = {
    **dict.fromkeys(("path", "image", "img", "name", "filename", "filepath", "slide", "wsi", "src", "url"), "file"),
    **dict.fromkeys(("left", "x0", "xmin", "posx"), "x"),
    **dict.fromkeys(("top", "y0", "ymin", "posy"), "y"),
    **dict.fromkeys(("w", "sizex"), "width"),
    **dict.fromkeys(("h", "sizey"), "height"),
    **dict.fromkeys(("lvl", "layer", "resolution"), "level"),
}


@lru_cache(maxsize=4096)
def canonical(key: str) -> str:
    """A key in small letters and digits only: `Patient-ID`, `patient_id` and `PatientID` are one."""
    folded = unicodedata.normalize("NFKC", key).casefold()
    return "".join(letter for letter in folded if letter.isalnum())


@lru_cache(maxsize=4096)
def shown_key(key: str) -> str:
    """A key's name if all its words are harmless, else `NOT_SHOWN`."""
    words = _WORD.findall(key)
    harmless = words and all(len(word) < 3 if word.isdigit() else word.lower() in HARMLESS_WORDS for word in words)
    return key if (harmless and _PLAIN.fullmatch(key)) or key == ROW_NUMBER else NOT_SHOWN


def shown_identifier(key: str) -> str:
    """A key's name if it looks like one, else `NOT_SHOWN`: for keys that are stored as they are."""
    return key if _IDENTIFIER.fullmatch(key) else NOT_SHOWN


def says_nothing(value: object) -> bool:
    """Whether a value is null, false, or empty: its key may be ignored whatever it is called."""
    return value is None or value is False or value == "" or value == [] or value == {}


def record_key_meant(key: str, value: object, record: dict[str, object], known: frozenset[str]) -> str | None:
    """The key of a record that another one is meant for; None if it is known, or nothing that is read.

    Another spelling of a known key always is; another word for one where the record lacks that.
    """
    if key in known or says_nothing(value):
        return None
    if (same := _same(key, known)) is not None:
        return same
    meant = _RECORD_SYNONYMS.get(canonical(key)) or _nearest(canonical(key))
    if meant is None and (_PICTURE.fullmatch(canonical(key)) or _names_picture(value)):
        meant = "image"
    return meant if meant is not None and says_nothing(record.get(meant)) else None


def turn_key_meant(key: str, value: object, turn: dict[str, object], known: frozenset[str]) -> str | None:
    """Likewise of a turn: `from`, `value`, a flag, or the record's `image`."""
    if key in known or value is None:
        return None
    if (same := _same(key, known)) is not None:
        return same
    if (flag := flag_meant(key, value)) is not None:
        return flag
    if not says_nothing(value) and (_PICTURE.fullmatch(canonical(key)) or _names_picture(value)):
        return "image"
    meant = _TURN_SYNONYMS.get(canonical(key))
    return meant if meant is not None and meant not in turn else None


def flag_meant(key: str, value: object) -> str | None:
    """The flag of a turn that a key of another name is; one of no known name may be any of them, so 'loss'."""
    if (flag := _FLAG_SYNONYMS.get(canonical(key))) is not None:
        return flag
    words = {word.lower() for word in _WORD.findall(key)}
    first = value[0] if isinstance(value, list) and value else value
    meant = words & _FLAG_WORDS or (words & _FLAG_WORDS_OF_NUMBERS and isinstance(first, bool | int | float))
    return "loss" if meant else None


def region_key_meant(key: str, known: frozenset[str]) -> str | None:
    """Likewise of a region of a slide."""
    return _same(key, known) or _REGION_SYNONYMS.get(canonical(key))


@lru_cache(maxsize=4096)
def _same(key: str, known: frozenset[str]) -> str | None:
    spelled = {canonical(one): one for one in known}
    return spelled.get(canonical(key))


@lru_cache(maxsize=4096)
def _nearest(key: str) -> str | None:
    """The key that may only be misspelt."""
    return next(iter(difflib.get_close_matches(key, ("image", "conversations", "system"), n=1, cutoff=0.8)), None)


def _names_picture(value: object) -> bool:
    """Whether a value is the name of a picture's file, or a list of some."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and len(first) < 4096 and _PICTURE_FILE.fullmatch(first) is not None
