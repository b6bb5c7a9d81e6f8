"""An exported model in lmms-eval: its requests become our prompts, whose answers are those of `composer-path ask`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from composer_path.asking.answer import Picture, Prompt
from composer_path.asking.assistant import Assistant
from composer_path.asking.sampling import BATCH_SIZE, Sampling
from composer_path.harnesses.pictures import file_of
from composer_path.records.conversation import Turn
from composer_path.records.image_tags import IMAGE_TAG, tag_as_text
from composer_path.records.messages import conversation_of, read_messages
from composer_path.records.tokenize import IGNORE_INDEX
from composer_path.weights.model_folder import PathMLLM

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
# Settings of other models that tasks carry along: pictures are prepared as in training, and these values ask nothing.
_INERT = {"num_beams": (1,), "use_cache": (True,), "image_aspect_ratio": ("original", "pad")}
_BATCHES_HELD = 8


class ComposerPath(lmms):
    """The model of a folder that `composer-path export` wrote; tasks give it messages.

    Args:
        pretrained: The folder.
        device: Such as `cpu` or `cuda`; a GPU where there is one.
        dtype: Of its weights: `auto` (as written), `fp32`, `bf16`.
        batch_size: How many questions are answered at once.
        max_batch_size: lmms-eval gives it; nothing is asked of it.
        system: Instead of the template's system message, where a task has none.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        system: str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"composer_path: dtype must be one of {', '.join(DTYPES)}; found '{dtype}'; choose one")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"composer_path: batch_size must be a number above 0; found '{batch_size}'; give one")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.assistant = Assistant.from_pretrained(pretrained, device=device, dtype=DTYPES[dtype])
        self.batch_size, self.system = int(batch_size), system

    @property
    def model(self) -> PathMLLM:
        """What answers; the harness asks for it."""
        return self.assistant.model

    @property
    def device(self) -> torch.device:
        """Where it answers; the harness asks for it."""
        return next(self.model.language_model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer; the harness asks for it."""
        return self.assistant.text.end_id(self.assistant.tokenizer)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in their order; greedy unless a task's `temperature` says otherwise."""
        answers: list[str] = []
        for some in self._groups(requests):
            asked = [self._asked(*request.args) for request in some]
            prompts, sampling = [list(column) for column in zip(*asked, strict=True)]
            said = self.assistant.answers(prompts, sampling, batch_size=self.batch_size)
            for request, text in zip(some, said, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            answers += said
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Tasks that ask on by what was answered; there are none for this model."""
        raise NotImplementedError("composer_path: no task of several rounds; choose tasks of one")

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Tasks of messages ask for none."""
        raise NotImplementedError("composer_path: likelihoods are asked with --force_simple; add it")

    def _asked(
        self, context: str, messages_of: Callable[[Any], Any], generation: Any, doc_id: int, task: str, split: str
    ) -> tuple[Prompt, Sampling]:
        """A task's messages as a prompt, and how it is to be answered."""
        messages = [dict(message) for message in messages_of(self.task_dict[task][split][doc_id])]
        asked = read_messages(messages)
        pictures = [self._picture(held.get("url", held.get("image"))) for held in asked.pictures]
        system = self.system if asked.system is None else asked.system
        return self.assistant.prompt(asked.turns, pictures, system=system), sampling_of(generation)

    def _picture(self, image: Any) -> Picture:
        if not isinstance(image, Image.Image):
            raise ValueError(f"composer_path: a task's pictures must be of Pillow; found {type(image).__name__}")
        return self.assistant.read_picture(file_of(image))

    def _groups(self, requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Requests whose pictures are held at a time."""
        size = _BATCHES_HELD * self.batch_size
        with tqdm(total=len(requests), disable=self.rank != 0, desc="composer_path") as bar:
            for start in range(0, len(requests), size):
                yield requests[start : start + size]
                bar.update(len(requests[start : start + size]))


class SimpleComposerPath(ComposerPath):
    """The same where a task gives a text and its pictures: they stand before it, unless it has a tag for each."""

    is_simple = True

    def _asked(self, context: str, generation: Any, *doc: Any) -> tuple[Prompt, Sampling]:  # type: ignore[override]
        turns, pictures = self._question(context, *doc)
        return self.assistant.prompt(turns, pictures, system=self.system), sampling_of(generation)

    def _question(
        self, context: str, visuals_of: Callable[[Any], Any], doc_id: int, task: str, split: str
    ) -> tuple[list[Turn], list[Picture]]:
        pictures = [self._picture(image) for image in visuals_of(self.task_dict[task][split][doc_id]) or []]
        tagged = context.count(IMAGE_TAG) == len(pictures)
        return [Turn("human", context if tagged else tag_as_text(context))], pictures

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of each request's answer: its loss as in training, its end included, and whether it is the greedy answer.

        It is a loss (nats for a token, the mean), not its negative: lmms-eval takes the least as the likeliest.
        """
        found = []
        for some in self._groups(requests):
            for request in some:
                if len(request.args) != 6:
                    raise ValueError("composer_path: acc_mutual_info asks without a picture; leave that metric out")
                context, target, *doc = request.args
                _, doc_id, task, split = doc
                answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
                pair = self._loss(*self._question(context, *doc), str(answer).strip())
                found.append(GenerationResult(text=pair))  # lmms-eval 0.7.3 makes a string of a bare pair of numbers
        return found

    def _loss(self, turns: list[Turn], pictures: list[Picture], answer: str) -> tuple[float, bool]:
        conversation = conversation_of([*turns, Turn("assistant", answer)], len(pictures), self.system)
        tokens = self.assistant.text.tokenize(conversation, self.assistant.tokenizer)
        embeds = self.assistant.features.embedded([Prompt(tokens.input_ids, tuple(pictures), 1)])[0][None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        scores = self.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[0, :-1]
        labels = tokens.labels[1:].to(scores.device)
        learned = labels != IGNORE_INDEX
        if not learned.any():
            raise ValueError("composer_path: the question leaves no room for an answer; ask a shorter one")
        loss = torch.nn.functional.cross_entropy(scores[learned].float(), labels[learned])
        return float(loss), bool((scores[learned].argmax(-1) == labels[learned]).all())


def sampling_of(generation: Mapping[str, Any]) -> Sampling:
    """How a task wants its answers: what it says of it, and greedily where it says nothing.

    Raises:
        ValueError: It asks for what we don't do, such as beams.
    """
    asked = {key: value for key, value in generation.items() if value is not None}
    asked = {key: value for key, value in asked.items() if value not in _INERT.get(key, ())}
    known = {"until", "temperature", "do_sample", "top_p", "max_new_tokens", "seed"}
    if others := sorted(set(asked) - known):
        raise ValueError(f"composer_path: generation_kwargs asks for {', '.join(others)}; leave it out of the task")
    until = asked.get("until", ())
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    limit, temperature = int(asked.get("max_new_tokens", Sampling.max_new_tokens)), float(asked.get("temperature", 0))
    if not (temperature and asked.get("do_sample", True)):
        return Sampling(limit, stop=stop)
    seed = int(asked.get("seed", torch.randint(2**31, ()).item()))  # of the harness's own draws
    return Sampling(limit, temperature, float(asked.get("top_p", 1)), seed, stop)
