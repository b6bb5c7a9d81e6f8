"""The language model's vocabulary: load a tokenizer, and turn plain text into ids that are never special tokens."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from composer_path.records.image_tags import IMAGE_TAG
from composer_path.storage.json_object import file_inside, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers takes seconds to import, and the shape checker resolves annotations at run time

# Keywords of transformers that would fetch a tokenizer, or run code that lies in its folder.
RESERVED = {"trust_remote_code", "code_revision", "revision", "token", "use_auth_token", "local_files_only"}
RESERVED |= {"force_download", "cache_dir", "proxies", "auto_map", "subfolder"}

# What transformers reads in a tokenizer's folder.
FILES: tuple[str, ...] = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
FILES += ("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json")

_Encode = Callable[[str], list[int]]

# No leading space: tokenizers differ there by design, and every reading of the same vocabulary must agree here.
_PROBE_TEXT = "The slide shows 12 nuclei (H&E, 3 µm).\nNext line."


class TokenizerKeywords(TypedDict, total=False):
    """What may be said of a tokenizer beside where it lies; transformers would take any word and value in silence."""

    use_fast: bool
    legacy: bool
    add_bos_token: bool
    add_eos_token: bool
    add_prefix_space: bool
    clean_up_tokenization_spaces: bool
    padding_side: Literal["left", "right"]
    truncation_side: Literal["left", "right"]
    model_max_length: int
    chat_template: str
    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: str


def load_tokenizer(path: str | Path, **kwargs: Any) -> Tokenizer:
    """Load a tokenizer from the local disk, without network and without running code from the folder.

    Args:
        path: A Hugging Face tokenizer folder, a folder that holds only `tokenizer.model`, or a `.model` file itself
            (the last two are read as a LLaMA tokenizer whose BOS, EOS and unknown token are the file's own).
        **kwargs: Of `TokenizerKeywords`, passed to transformers.
    """
    if refused := sorted(RESERVED & set(kwargs)):
        raise ValueError(f"tokenizer.{refused[0]}: is not set here; no code is run and nothing fetched; leave it out")
    for unknown in sorted(kwargs.keys() - TokenizerKeywords.__annotations__):
        raise ValueError(f"tokenizer.{unknown}: unknown key; there are {', '.join(TokenizerKeywords.__annotations__)}")
    path = Path(path).expanduser()
    if path.is_file():
        return _load_sentencepiece_file(path, **kwargs)
    if not path.is_dir():
        raise ValueError(f"tokenizer.path: there is no file or folder {str(path)!r}; give a local tokenizer folder")
    if (path / "tokenizer_config.json").is_file() or (path / "tokenizer.json").is_file():
        return _load_folder(path, **kwargs)
    if (path / "tokenizer.model").is_file():
        return _load_sentencepiece_file(path / "tokenizer.model", **kwargs)
    raise ValueError(
        f"tokenizer.path: {str(path)!r} holds no tokenizer; expected tokenizer_config.json, tokenizer.json or "
        "tokenizer.model in it"
    )


def check_vocabulary(tokenizer: Tokenizer, num_embeddings: int) -> None:
    """Refuse a tokenizer with ids that the language model has no embedding for; unused embeddings are usual.

    Two tokens are never met: one that only fills batches up, as no batch is padded, and an image's, which exports add.

    Raises:
        ValueError: With the first such token, and how many there are.
    """
    met = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    ids = {id: token for token, id in tokenizer.get_vocab().items() if not 0 <= id < num_embeddings}
    if tokenizer.pad_token_id not in met:
        ids.pop(tokenizer.pad_token_id, None)
    ids = {
        id: token for id, token in ids.items() if token != IMAGE_TAG or not tokenizer.added_tokens_decoder[id].special
    }
    if ids:
        first, fix = min(ids), "take this language model's own, or set model.language_model.resize_embeddings: true"
        found = f"found {len(ids)} tokens beyond, from id {first} ({ids[first]!r}) on"
        raise ValueError(
            f"tokenizer.path: its ids must be below the language model's {num_embeddings} embeddings, {found}; {fix}"
        )


def num_ids(tokenizer: Tokenizer) -> int:
    """How many embeddings a tokenizer's ids need."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Save a tokenizer as a Hugging Face folder.

    Its sentencepiece file and LLaMA's `legacy` setting are added, which transformers 5 would leave out, and what it has
    new words for is said in the old ones, which both know.
    """
    tokenizer.save_pretrained(str(folder))
    settings_file = Path(folder, "tokenizer_config.json")
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    if "legacy" not in settings and getattr(tokenizer, "legacy", None) is not None:
        settings["legacy"] = tokenizer.legacy
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file = _sentencepiece_file(tokenizer)
    if file is not None and not Path(folder, "tokenizer.model").exists():
        shutil.copyfile(file, Path(folder, "tokenizer.model"))


def _sentencepiece_file(tokenizer: Tokenizer) -> Path | None:
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    return file if file.suffix == ".model" and file.is_file() else None


def _load_folder(path: Path, **kwargs: Any) -> Tokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, __version__

    tokenizer_class: Any = AutoTokenizer
    settings = _checked_settings(path)
    if int(__version__.split(".")[0]) < 5:  # which fails on two words of transformers 5
        if isinstance(extra := settings.get("extra_special_tokens"), list):
            kwargs = {"extra_special_tokens": {}, "additional_special_tokens": extra} | kwargs
        if settings.get("tokenizer_class") == "TokenizersBackend":
            tokenizer_class = PreTrainedTokenizerFast
            kwargs.pop("use_fast", None)
    try:
        tokenizer = tokenizer_class.from_pretrained(str(path), local_files_only=True, trust_remote_code=False, **kwargs)
    except Exception as error:
        if (
            "tiktoken" in str(error).lower() and (path / "tokenizer.model").is_file()
        ):  # whatever isn't sentencepiece's own
            fix = "copy it again, or run `git lfs pull`"
            raise ValueError(f"tokenizer.model in it is no whole sentencepiece model; {fix}") from error
        raise
    templates = getattr(tokenizer, "chat_template", None)
    for name in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w-]+", str(name)):  # each is saved as a file of its name, until transformers 5.10
            fix = "rename it in tokenizer_config.json"
            raise ValueError(
                f"tokenizer.path: chat templates in '{path}' must be named by words, found {name!r}; {fix}"
            )
    return tokenizer


def _checked_settings(folder: Path) -> dict[str, Any]:
    """What a folder's `tokenizer_config.json` says, which may name no files outside of the folder."""
    for name in FILES:
        if (folder / name).is_symlink():
            file_inside(folder, name)
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file) if file.is_file() else {}
    for key, value in settings.items():
        if key.endswith("_file") and isinstance(value, str):  # transformers would take it for the folder's own
            fix = "take that key out"
            raise ValueError(f"tokenizer.path: '{file}' must name no files, found {key} = {value!r:.80}; {fix}")
    names = settings.get("fast_tokenizer_files") or []
    for name in names if isinstance(names, list) else [names]:
        file_inside(folder, name)
    return settings


def _load_sentencepiece_file(file: Path, **kwargs: Any) -> Tokenizer:
    """Read a bare sentencepiece file as LLaMA's: `legacy` is LLaMA-2's own way (a space after each special token)."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"tokenizer.path: {str(file)!r} is not a sentencepiece model; give a tokenizer.model or its folder"
        ) from error
    ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    config: dict[str, Any] = {name: pieces.id_to_piece(id) if id >= 0 else None for name, id in ids.items()}
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "clean_up_tokenization_spaces": False}
    config |= {"add_bos_token": True, "add_eos_token": False}
    # A folder is the one form that transformers 4 and 5 read alike; the file itself stays where it is.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(file, Path(folder, "tokenizer.model"))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = _load_folder(Path(folder), **kwargs)
    tokenizer.vocab_file = str(file)
    tokenizer.name_or_path = str(file.parent)
    return tokenizer


class TextEncoder:
    """Plain text to ids, never special tokens, whatever the text says.

    Where the tokenizer has a sentencepiece model that agrees with it, the segmentation is sentencepiece's own; control
    pieces can't come from text there. Otherwise the tokenizer's own model does it, with its special tokens switched
    off. Added tokens count as special even if they are not flagged so (some chat models add their markers like that),
    except runs of whitespace, which some vocabularies store as added tokens.

    Attributes:
        tokenizer: A slow or fast one of transformers.
        special_tokens: The special tokens' text and ids.
        prefix_after_special: Whether the tokenizer itself starts a new text (with its leading space) after a special
            token, as LLaMA-2's does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_tokens = _special_tokens(tokenizer)
        # Any character that a vocabulary lacks becomes its unknown token, so that one is no sign of a marker.
        self._marker_ids = frozenset(self.special_tokens.values()) - {tokenizer.unk_token_id}
        # Longest first, so that <|end|> never hides <|end|>x.
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        added = list(tokenizer.added_tokens_decoder.values())
        self._strips_left = {token.content for token in added if token.lstrip}
        self._strips_right = {token.content for token in added if token.rstrip}
        self._encode_start, self._encode_inside = _sentencepiece_encoders(tokenizer) or _own_encoders(tokenizer)
        self.prefix_after_special = self._measure_prefix_after_special()

    def __reduce__(self) -> tuple[type[TextEncoder], tuple[Any]]:
        return TextEncoder, (self.tokenizer,)  # rebuilt in another process: the encoders don't pickle

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Turn text into ids; `</s>` or `<|im_end|>` in it are spelled out in ordinary tokens.

        With `prefix` the text starts a new piece, so it gets the leading space that vocabularies such as LLaMA's put
        there; without, it continues the text before it.
        """
        ids = (self._encode_start if prefix else self._encode_inside)(text) if text else []
        return ids if self._marker_ids.isdisjoint(ids) else self._encode_in_parts(text, prefix)

    def split_special_tokens(self, text: str) -> list[int | str]:
        """Split a template's own text (never a conversation's) into special token ids and the text between them."""
        parts: list[int | str] = []
        position = 0
        strip_next = False
        for match in self._special_pattern.finditer(text):
            between = text[position : match.start()]
            between = between.lstrip() if strip_next else between
            between = between.rstrip() if match[0] in self._strips_left else between
            parts += [between] if between else []
            parts.append(self.special_tokens[match[0]])
            strip_next = match[0] in self._strips_right
            position = match.end()
        rest = text[position:].lstrip() if strip_next else text[position:]
        return [*parts, rest] if rest else parts

    def _encode_in_parts(self, text: str, prefix: bool) -> list[int]:
        """Some models (Gemma's sentencepiece, unigram ones) hold special tokens as ordinary pieces: cut inside them."""
        cuts = [0, *(match.start() + 1 for match in self._special_pattern.finditer(text)), len(text)]
        ids: list[int] = []
        for start, end in pairwise(cuts):
            encode = self._encode_start if prefix and start == 0 else self._encode_inside
            part = encode(text[start:end])
            if not self._marker_ids.isdisjoint(part):  # normalisation made one out of other characters
                part = [id for character in text[start:end] for id in self._encode_inside(character)]
            ids += part
        return ids

    def _measure_prefix_after_special(self) -> bool:
        for text, id in self.special_tokens.items():
            ids = self.tokenizer.encode(text + "tissue", add_special_tokens=False)
            if ids[:1] == [id]:
                return ids[1:] != self._encode_inside("tissue")
        return True


def text_encoder(tokenizer: Tokenizer | TextEncoder) -> TextEncoder:
    """The encoder of a tokenizer; built once for each tokenizer object, and again when tokens were added to it."""
    if isinstance(tokenizer, TextEncoder):
        return tokenizer
    return _build_encoder(tokenizer, len(tokenizer.added_tokens_decoder))


@lru_cache(maxsize=8)
def _build_encoder(tokenizer: Tokenizer, num_added_tokens: int) -> TextEncoder:
    return TextEncoder(tokenizer)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return added | {token: id for token, id in named if id is not None}


def _sentencepiece_encoders(tokenizer: Tokenizer) -> tuple[_Encode, _Encode] | None:
    """Sentencepiece's own segmentation at the start of a text and inside one; None if the tokenizer's ids differ."""
    if (file := _sentencepiece_file(tokenizer)) is not None:
        proto = file.read_bytes()
    elif hasattr(tokenizer, "sp_model"):
        proto = tokenizer.sp_model.serialized_model_proto()
    else:
        return None
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    try:
        start = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError:  # a .model file of another kind (tiktoken's)
        return None
    added_ids = set(tokenizer.added_tokens_decoder)
    ids = [id for id in range(start.vocab_size()) if id not in added_ids]
    same_pieces = tokenizer.convert_ids_to_tokens(ids) == [start.id_to_piece(id) for id in ids]
    if not same_pieces or tokenizer.encode(_PROBE_TEXT, add_special_tokens=False) != start.encode(_PROBE_TEXT):
        return None
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False  # a space inside a text is part of it
    return start.encode, sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()).encode


def _own_encoders(tokenizer: Tokenizer) -> tuple[_Encode, _Encode]:
    """The tokenizer's own segmentation at the start of a text and inside one, with its special tokens switched off."""
    if not tokenizer.is_fast:

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

        return encode, encode
    import tokenizers

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    for token in spec["added_tokens"]:
        token["special"] = not token["content"].isspace()  # what is special is ignored below

    def build(spec: dict[str, Any]) -> _Encode:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.encode_special_tokens = True  # special tokens are encoded as the text they are
        return lambda text: backend.encode(text, add_special_tokens=False).ids

    inside = spec | {key: _without_prefix(spec[key]) for key in ("normalizer", "pre_tokenizer")}
    return build(spec), build(inside)


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer of the `tokenizers` library that puts no space in front of the text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return step | {key: [kept for one in step[key] if (kept := _without_prefix(one)) is not None]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return step | {"add_prefix_space": False}
    return step
