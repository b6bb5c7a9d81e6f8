"""One thread in which the model answers many requests at once; each begins as soon as there is room, and may leave."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal

from composer_path.asking.answer import Answer
from composer_path.asking.assistant import Assistant
from composer_path.asking.sampling import Drawn
from composer_path.serving.refusal import Refusal, busy

# A piece of text with its tokens, the end, or why there is none.
Event = tuple[Literal["piece"], str, list[Drawn]] | tuple[Literal["end"]] | tuple[Literal["failed"], Refusal]


class Job:
    """An answer that is waited for.

    Args:
        answer: Of which nothing is written.
        stream: Whether it is told piece by piece; else in one.
        tell: Called in the engine's thread.
    """

    def __init__(self, answer: Answer, stream: bool, tell: Callable[[Event], None]) -> None:
        self.answer, self.stream, self.tell = answer, stream, tell
        self.left = False  # nobody waits any more

    def leave(self) -> None:
        """Wait no more: its row makes room for another."""
        self.left = True


class Engine:
    """Answers jobs, `max_batch` at once, in a thread of its own.

    Args:
        assistant: Whose model nobody else asks meanwhile.
        max_batch: Answers that are written together.
        max_waiting: Jobs that may wait for room.
    """

    def __init__(self, assistant: Assistant, max_batch: int = 16, max_waiting: int = 64) -> None:
        self.max_batch = assistant.rows_at_once(max_batch)
        self._decoding = assistant.decoding()
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job done; a `Refusal` says that too many wait."""
        with self._changed:
            if self._ends or len(self._waiting) >= self._max_waiting:
                raise busy()
            self._waiting.append(job)
            self._changed.notify()

    @property
    def num_running(self) -> int:
        """How many answers are being written."""
        return len(self._running)

    def end(self, seconds: float = 10.0) -> None:
        """Write no more, and wait for the thread."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while (new := self._next()) is not None:
            try:
                self._let_in(new)
                if self._running:
                    self._write()
            except Exception as error:  # the model's own, such as no memory left: whoever is answered is told
                self._decoding.clear()
                self._fail(self._running.values(), _why(error))
                self._running.clear()
        self._fail([*self._running.values(), *self._waiting], "the server ends")

    def _next(self) -> list[Job] | None:
        """Jobs to begin with now, once there is something to do; None at the end."""
        with self._changed:
            while not (self._ends or self._waiting or self._running):
                self._changed.wait()
            if self._ends:
                return None
            new: list[Job] = []
            while self._waiting and len(self._running) + len(new) < self.max_batch:
                job = self._waiting.popleft()
                if not job.left:
                    new.append(job)
            return new

    def _let_in(self, new: list[Job]) -> None:
        """Those who left make room; new prompts are read."""
        for job in [job for job in self._running.values() if job.left]:
            self._decoding.drop(job.answer)
            del self._running[id(job.answer)]
        if not new:
            return
        try:
            self._decoding.begin([job.answer for job in new])
        except Exception as error:  # the others go on
            self._fail(new, _why(error))
        else:
            self._running |= {id(job.answer): job for job in new}

    def _write(self) -> None:
        """Write a token of each answer, and tell it."""
        self._decoding.step()
        for job in list(self._running.values()):
            ended = job.answer.finish is not None
            if job.stream or ended:
                text, tokens = job.answer.piece()
                if text or tokens:
                    self._tell(job, ("piece", text, tokens))
            if ended:
                del self._running[id(job.answer)]
                self._tell(job, ("end",))

    def _fail(self, jobs: Iterable[Job], why: str) -> None:
        for job in jobs:
            self._tell(job, ("failed", Refusal(why, 500, code="model_failed")))

    def _tell(self, job: Job, event: Any) -> None:
        try:
            job.tell(event)
        except RuntimeError:  # whoever waited is gone with the loop
            job.left = True


def _why(error: Exception) -> str:
    return f"the model could not answer ({type(error).__name__}); ask again later"
