"""Asking a trained model: a conversation over images, answered token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from composer_path.asking.answer import Answer, Picture, Prompt
from composer_path.asking.decoding import Decoding, rows_at_once, write_all
from composer_path.asking.image_features import ImageFeatures
from composer_path.asking.processor_config import check_image_token, read_processor_config
from composer_path.asking.sampling import BATCH_SIZE, Sampling
from composer_path.hugging_face.processor_folder import PROCESSOR_CONFIG
from composer_path.images.examiner import Examiner
from composer_path.images.pixels import ImagePreparation
from composer_path.images.untrusted import load_untrusted, load_untrusted_file, require_file
from composer_path.models.language_types import go_on, longest_conversation, room_behind
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.messages import conversation_of
from composer_path.records.rules import ImageError
from composer_path.records.slide_region import SlideRegion
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer
from composer_path.weights.model_folder import PathMLLM

MAX_NEW_TOKENS = Sampling.max_new_tokens  # where an answer is cut unless it is told otherwise


class Assistant:
    """A model with its tokenizer, and its inputs prepared as in training.

    Args:
        model: On the device it shall run on.
        tokenizer: Of its language model.
        text: How text was prepared when it was trained.
        images: How images were.
    """

    def __init__(
        self, model: PathMLLM, tokenizer: PreTrainedTokenizerBase, text: TextPreparation, images: ImagePreparation
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.text, self.images = text, images
        self.features = ImageFeatures(model)
        vocabulary = tokenizer.get_vocab()
        self._byte_ids = frozenset(vocabulary[name] for n in range(256) if (name := f"<0x{n:02X}>") in vocabulary)
        added = tokenizer.added_tokens_decoder.items()
        # An image's token stands for vectors in a prompt; no answer holds it, though it has a row as all have.
        of_images = {id for id, token in added if token.special and token.content == IMAGE_TAG}
        of_folder: int | None = getattr(model, "image_token_id", None)
        self.never_written = sorted(of_images if of_folder is None else {*of_images, of_folder})

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> Assistant:
        """Load a folder written by an export or at the end of a finetuning run.

        Raises:
            ValueError: Not such a folder.
        """
        folder = Path(folder)
        if not (folder / PROCESSOR_CONFIG).is_file():  # told before weights are read
            raise ValueError(f"no {PROCESSOR_CONFIG} in '{folder}'; give the folder that composer-path export wrote")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = PathMLLM.from_pretrained(folder, dtype=dtype)
            assistant = cls(model, load_tokenizer(folder), *read_processor_config(folder, model))
            check_image_token(folder, model, assistant.tokenizer)
            assistant.end_ids()  # a tokenizer or template that can't be used says so here
        except (ValueError, OSError, MemoryError):
            raise
        except Exception as error:  # of any library, by any damage: tokenizers has no class of its own for it
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"'{folder}': must be as export wrote it; found {said}; export the model again") from error
        model.to(device)
        return assistant

    @property
    def takes_question(self) -> bool:
        """Whether the model was trained to answer questions; if not, it captions."""
        return self.text.template.takes_question

    def read_image(self, path: str | Path, region: SlideRegion | None = None) -> Picture:
        """A picture, or a region of the slide at `path`, as the model sees it, not normalised.

        Raises:
            ValueError: No such file, or it can't be read as a picture.
        """
        if region is None:
            return load_untrusted_file(path, self.images)
        require_file(path)
        try:
            return self.images.load_stored(Examiner().region(path, region, self.images.max_pixels).data)
        except ImageError as error:
            raise ValueError(f"image '{path}': {error}") from None

    def read_picture(self, data: bytes, examiner: Examiner | None = None) -> Picture:
        """The picture in the bytes of an image file; raises `ImageError` where a conversion would refuse it."""
        return load_untrusted(data, self.images, examiner)

    def answer(
        self,
        turns: Sequence[tuple[str, str]],
        images: Sequence[Picture] = (),
        *,
        system: str | None = None,
        **generation: Any,
    ) -> str:
        """The next answer of a conversation.

        Args:
            turns: ("human" or "assistant", text), the last one human. Where no text has an `<image>` tag, the images
                stand before the first question.
            images: In the order of the tags.
            system: Instead of the template's system message.
            **generation: Keywords of transformers' `generate`, such as `do_sample=True, temperature=0.7`, `streamer`
                (receives tokens as they come) or `max_new_tokens` (the answer is cut there; by default at 512).

        Raises:
            ValueError: The model's template takes no question, or the conversation is too long for the model.
        """
        self._check_takes_question()
        told = [Turn(role, text) for role, text in turns]
        return self._continue(conversation_of(told, len(images), system), images, **generation)

    def caption(self, images: Sequence[Picture], **generation: Any) -> str:
        """What a model that takes no question says of images. Arguments as those of `answer`.

        Raises:
            ValueError: There is no image, or the model's template takes a question.
        """
        if self.takes_question:
            raise ValueError(f"the model's template '{self.text.template.name}' takes a question; give one")
        return self._continue(_captioned(len(images)), images, **generation)

    def prompt(self, turns: Sequence[Turn], images: Sequence[Picture] = (), *, system: str | None = None) -> Prompt:
        """What `answer` (or, without turns, `caption`) asks, as the model reads it.

        Raises:
            ValueError: As `answer` and `caption` do.
        """
        if turns:
            self._check_takes_question()
            return self._prompt(conversation_of(turns, len(images), system), images)
        if self.takes_question:
            raise ValueError(f"the model's template '{self.text.template.name}' takes a question; give one")
        return self._prompt(_captioned(len(images)), images)

    def answers(
        self,
        prompts: Sequence[Prompt],
        sampling: Sequence[Sampling] | Sampling | None = None,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> list[str]:
        """The answers to several prompts, in their order: those of `answer`, several at once and each image once.

        Args:
            prompts: From `prompt`.
            sampling: How they are written, all of them or one by one; greedily by default.
            batch_size: How many are written together.
        """
        if sampling is None or isinstance(sampling, Sampling):
            sampling = [sampling or Sampling()] * len(prompts)
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, found {batch_size}; correct it")
        pairs = zip(prompts, sampling, strict=True)
        answers = [self.begin(prompt, one) for prompt, one in pairs]
        write_all(self.decoding(), answers, self.rows_at_once(batch_size))
        return [answer.text for answer in answers]

    def begin(self, prompt: Prompt, sampling: Sampling) -> Answer:
        """An answer of which nothing is written yet."""
        cleans = bool(getattr(self.tokenizer, "clean_up_tokenization_spaces", False))
        return Answer(prompt, sampling, self._decoded, self.end_ids(), self._byte_ids, cleans)

    def decoding(self) -> Decoding:
        """What writes answers together."""
        return Decoding(self.model, self.features, self.never_written)

    def rows_at_once(self, wanted: int) -> int:
        """How many answers may be written together, `wanted` if nothing speaks against it."""
        return rows_at_once(self.model, wanted, self._limit)

    def _check_takes_question(self) -> None:
        if not self.takes_question:
            raise ValueError(
                f"the model was trained with the template '{self.text.template.name}', which takes no question: every "
                "one would get the same answer; ask without a question, and the model describes the image"
            )

    @property
    def _limit(self) -> int | None:
        """How many tokens a conversation may have: as in training, else as many as the language model can place."""
        return longest_conversation(self.model.language_model.config, self.text.max_seq_len)

    def _prompt(self, conversation: Conversation, images: Sequence[Picture]) -> Prompt:
        ids = self.text.prompt(conversation, self.tokenizer)
        return Prompt(ids, tuple(images), room_behind(len(ids), self._limit))

    def _continue(
        self,
        conversation: Conversation,
        images: Sequence[Picture],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **generation: Any,
    ) -> str:
        prompt = self._prompt(conversation, images)
        (embeds,) = self.features.embedded([prompt])  # in a chat each question comes with the same pictures
        new = go_on(
            self.model.language_model,
            embeds,
            max_new_tokens=min(max_new_tokens, prompt.room),
            eos_token_id=self.end_ids(),
            pad_token_id=self.tokenizer.pad_token_id or 0,
            suppress_tokens=self.never_written or None,
            **generation,
        )
        return self._decoded(new.tolist()).strip()

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the one the template trains, and the tokenizer's own."""
        return self.text.end_ids(self.tokenizer)


def _captioned(num_images: int) -> Conversation:
    """Images without a word."""
    if not num_images:
        raise ValueError("a caption needs an image; give one")
    return conversation_of([Turn("human", IMAGE_TAG * num_images)], num_images)
