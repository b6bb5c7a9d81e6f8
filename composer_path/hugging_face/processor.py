"""Text and pictures to what the model takes, behind transformers' interface of processors; ids are training's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

from transformers import BatchEncoding
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from composer_path.hugging_face.image_processor import flat
from composer_path.hugging_face.pictures import picture_in
from composer_path.hugging_face.spelling import pieces_of
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR
from composer_path.own_parts.registry import check_sources
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.messages import conversation_of, read_messages
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import IMAGE_TOKEN_ID, TextPreparation
from composer_path.records.vocabulary import text_encoder

# What callers may say of text; the rest is as in training.
_TEXT_WORDS = {"add_special_tokens", "padding", "padding_side", "return_attention_mask", "return_tensors"}
_TEXT_WORDS |= {"return_mm_token_type_ids", "return_token_type_ids", "return_text_replacement_offsets"}
# What `processor_config.json` may say, and what transformers and we write beside it.
_SETTINGS = ("template", "image_position", "max_seq_len", "image_token", "num_image_tokens", "imports", "chat_template")
_BESIDE = {"processor_class", "auto_map", "transformers_version", "image_processor", "tokenizer"}
_NESTED = ("text_kwargs", "images_kwargs", "common_kwargs", "videos_kwargs", "audio_kwargs")


class ComposerPathProcessor(ProcessorMixin):
    """A tokenizer, an image processor and how text was prepared when the model was trained.

    Args:
        image_processor: A `ComposerPathImageProcessor`.
        tokenizer: With the image token.
        chat_template: Jinja, made by the export.
        template: As `composer_path.records.prompts.get_template` takes it.
        image_position: `front` of its message, or `inline`.
        max_seq_len: The longest that was trained.
        image_token: Stands in text where an image does.
        num_image_tokens: How many ids an image takes.
        imports: Where a template of one's own comes from.
        **kwargs: Nothing else.
    """

    tokenizer: Any
    image_processor: Any
    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    if TRANSFORMERS_MAJOR < 5:  # which reads them; later ones ask the Auto classes
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template: Any = "llava_llama_2",
        image_position: str = "front",
        max_seq_len: int | None = None,
        image_token: str = IMAGE_TAG,
        num_image_tokens: int = 1,
        imports: Any = None,
        **kwargs: Any,
    ) -> None:
        self.template, self.image_position, self.max_seq_len = template, image_position, max_seq_len
        self.image_token, self.num_image_tokens, self.imports = image_token, num_image_tokens, list(imports or [])
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.image_ids = [self.image_token_id]
        self._prompt_template = get_template(template)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """From what a folder's files say; raises ValueError where that isn't what an export writes."""
        told = kwargs.pop("return_unused_kwargs", False)
        if unknown := sorted(processor_dict.keys() - {*_SETTINGS} - _BESIDE):
            found = f"found unknown keys {unknown[:5]}"
            raise ValueError(f"processor_config.json: must be as export wrote it; {found}; export the model again")
        check_sources("processor_config.json", processor_dict)
        processor = cls(*args, **{key: processor_dict[key] for key in _SETTINGS if key in processor_dict})
        return (processor, kwargs) if told else processor

    def __call__(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        """Ids of one text or several, and the pixels of all their images, in order.

        Args:
            images: As the image processor takes them; lists for several texts.
            text: A prompt that the chat template wrote, or several. `<image>` stands for an image; it may also stand
                there as often already as the image takes ids.
            *args: Nothing: no video, no sound.
            **kwargs: `return_tensors`, `padding` (to the longest, on the left), `return_mm_token_type_ids`.

        Raises:
            ValueError: Images and their tokens differ in number, or another keyword: nothing is cut, for instance.
        """
        words = self._words(kwargs, args)
        result: dict[str, Any] = {}
        pictures = list(flat(images))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            rows = [self._unexpanded(one) for one in texts]
            tokens = sum(row.count(self.image_token_id) for row in rows)
            each = self.num_image_tokens
            whole = tokens == len(pictures) * each if images is not None else all(map(self._holds_whole_images, rows))
            rows = rows if whole else [self._expanded(row) for row in rows]
            found = tokens // each if whole else tokens
            if images is not None and found != len(pictures):
                raise ValueError(
                    f"processor: the text has {found} times {self.image_token} and there are {len(pictures)} images; "
                    "give each its own, with apply_chat_template or by hand"
                )
            result |= self._padded(rows, words)
            if words.get("return_text_replacement_offsets"):
                result["text_replacement_offsets"] = self.get_text_with_replacements(
                    texts, [self.image_token if whole else self._image] * tokens
                )[1]
        return self._with_pixels(result, pictures, words, isinstance(text, str))

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool | None = None,
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or several, as text or (with `tokenize`) as what the model takes.

        Ids are made of the messages themselves, as in training; nothing is fetched from a network. Messages that end
        with a question end where the answer begins.

        Args:
            conversation: Messages `{role, content}`, or a list of such lists.
            chat_template: Another one than the model's; then transformers does it all.
            tokenize: Ids instead of text.
            return_dict: All that the model takes instead of the ids alone.
            add_generation_prompt: Of text: whether the answer's beginning is written; by default after a question.
            images: Those for `<image>` in contents that are strings.
            **kwargs: As calls of the processor take them, or transformers' own.

        Raises:
            ValueError: The messages aren't such, can't be told to the model, or another picture than a local one.
        """
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        told = list(conversation) if several else [conversation]
        for key in ("tools", "documents", "continue_final_message", "return_assistant_tokens_mask"):
            if kwargs.pop(key, None):
                raise ValueError(f"processor: '{key}' must be left out; the model was trained without it")
        if not tokenize or chat_template not in (None, self.chat_template):
            asks = all(one and one[-1].get("role") == "user" for one in told)
            adds = asks if add_generation_prompt is None else add_generation_prompt
            more = {"images": images} if images is not None else {}
            return super().apply_chat_template(
                conversation, chat_template, tokenize=tokenize, return_dict=return_dict, add_generation_prompt=adds,
                **more, **kwargs,
            )  # fmt: skip
        words = self._words({**(kwargs.pop("processor_kwargs", None) or {}), **kwargs}, ())
        images = words.pop("images", None) if images is None else images
        rows, pictures = [], []
        given = list(flat(images))
        for messages in told:
            asked = read_messages(messages)
            held = [picture_in(one) for one in asked.pictures]
            if not held and given:
                count = sum(turn.text.count(IMAGE_TAG) for turn in asked.turns if turn.role == "human")
                held, given = (given[:count], given[count:]) if count or several else (given, [])
            rows.append(self._ids_of_turns(conversation_of(asked.turns, len(held), asked.system)))
            pictures += held
        if given:
            raise ValueError(f"processor: each image must have its place; found {len(given)} more than {IMAGE_TAG}")
        result = self._with_pixels(self._padded(rows, words), pictures, words, not several)
        return result if return_dict else result["input_ids"]

    def _ids_of_turns(self, conversation: Any) -> list[int]:
        text = TextPreparation(self._prompt_template, self.num_image_tokens, None, self.image_position)
        if conversation.turns[-1].role == "human":
            ids = text.prompt(conversation, self.tokenizer)
        else:
            ids = text.tokenize(conversation, self.tokenizer).input_ids
        return [self.image_token_id if id == IMAGE_TOKEN_ID else id for id in ids.tolist()]

    @property
    def _image(self) -> str:
        return self.image_token * self.num_image_tokens

    def _with_pixels(
        self, result: dict[str, Any], pictures: list[Any], words: Mapping[str, Any], alone: bool
    ) -> BatchFeature:
        tensors = words.get("return_tensors")
        if pictures:
            result |= dict(self.image_processor(pictures, return_tensors=tensors))
        if alone and tensors is None and not words.get("padding"):
            result = {key: value[0] if key != "pixel_values" else value for key, value in result.items()}
        return BatchFeature(result, tensor_type=None)

    def ids_of(self, text: str) -> list[int]:
        """A prompt's ids; special tokens are those that the chat template wrote, never what a message spells."""
        return self._expanded(self._unexpanded(text))

    def _expanded(self, row: list[int]) -> list[int]:
        """A row in which each image token stands for an image, with as many as an image takes."""
        image, each = self.image_token_id, self.num_image_tokens
        return [id for one in row for id in ([one] * each if one == image else [one])]

    def _holds_whole_images(self, row: list[int]) -> bool:
        """Whether image tokens stand in a row as often as images take them, one behind the other."""
        runs = [len(list(run)) for id, run in groupby(row) if id == self.image_token_id]
        return all(run % self.num_image_tokens == 0 for run in runs)

    def _unexpanded(self, text: str) -> list[int]:
        """A prompt's ids with its image tokens as it has them."""
        encoder = text_encoder(self.tokenizer)
        after_special = self._prompt_template.prefix_after_special or encoder.prefix_after_special
        ids: list[int] = []
        prefix = True  # the next text starts a new piece
        for part in encoder.split_special_tokens(text):
            if isinstance(part, int):
                ids.append(part)
                prefix = after_special
                continue
            for piece in pieces_of(part):
                if piece:
                    ids += encoder.encode(piece, prefix)
                    prefix = False
        return ids

    def _padded(self, rows: Sequence[list[int]], words: Mapping[str, Any]) -> dict[str, Any]:
        tensors, asked = words.get("return_tensors"), words.get("padding")
        pads = asked is True or str(asked) in ("longest", "PaddingStrategy.LONGEST") or (asked is None and tensors)
        longest = max(map(len, rows), default=0)
        if not pads and tensors is not None and len({*map(len, rows)}) > 1:
            raise ValueError("processor: texts of several lengths make no tensor without padding=True")
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        right = words.get("padding_side") == "right"  # else on the left, whatever the tokenizer says: a model generates
        ids, mask = [], []
        for row in rows:
            empty = (longest - len(row)) if pads else 0
            blank, none = [pad or 0] * empty, [0] * empty
            ids.append(row + blank if right else blank + row)
            mask.append([1] * len(row) + none if right else none + [1] * len(row))
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if words.get("return_mm_token_type_ids"):
            found["mm_token_type_ids"] = [[int(id == self.image_token_id) for id in row] for row in ids]
        if words.get("return_attention_mask") is False:
            del found["attention_mask"]
        return dict(BatchEncoding(found, tensor_type=tensors)) if tensors is not None else found

    def _words(self, kwargs: Mapping[str, Any], args: Sequence[Any]) -> dict[str, Any]:
        """What callers say, flat; refused where it would change what was trained."""
        words: dict[str, Any] = {}
        for key, value in kwargs.items():
            words |= value if key in _NESTED and isinstance(value, Mapping) else {key: value}
        for key in ("videos", "audio", "audios", "video"):
            if any(one is not None for one in (words.pop(key, None), *args)):
                raise ValueError("processor: takes text and images only")
        for key, value in words.items():
            harmless = value is None or value is False or key in ("device", "max_length", "pad_to_multiple_of")
            harmless = harmless or key.startswith("video_")  # transformers 4 names them for any model
            if key not in _TEXT_WORDS and not harmless:
                raise ValueError(f"processor: '{key}' can't be set, text and images are prepared as in training")
        return words

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        """What stands for an image: its token, as often as it takes ids."""
        return self._image

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        """How many ids images of some sizes take, for vLLM."""
        from transformers.processing_utils import MultiModalData

        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated ids."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of the result."""
        return ["input_ids", "attention_mask", "pixel_values"]
