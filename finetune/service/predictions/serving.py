"""Predictions: each model in a process of its own, requests batched while they wait.

::

    request -> queue -> batch of at most B images, or of what came within T ms -> process -> answers

A process that ends is started again. The batch that it had is then tried image by image, so that an image
that ends it costs its own request only. A newer version takes over once it is ready; requests that wait for
the older one are answered by it first.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune.errors import EnvironmentFaultError
from finetune.launch.supervisor import own_command
from finetune.service.predictions.frames import read_frame, write_frame
from finetune.service.settings import own_environment

MOST_IMAGES = 32
"""Images of a batch (B)."""
WAIT = 0.005
"""Seconds that a batch waits for more images (T)."""
START_SECONDS = 120.0
_MODULE = "finetune.service.predictions.model_process"
Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """An image of a request: the bytes of a file, or RGB pixels with their height and width.

    Attributes:
        content: the bytes.
        shape: height and width of pixels; None for a file.
        wants_map: whether a heat map of the most probable class is drawn.
    """

    content: bytes
    shape: tuple[int, int] | None = None
    wants_map: bool = False


@dataclass
class _Waiting:
    picture: Picture
    answer: Future[Answer] = field(default_factory=Future)


class ModelProcess:
    """A process that has loaded a model.

    Args:
        folder: the model's folder.
        log: file for what the process prints.

    Attributes:
        facts: classes, input size and architecture of the model.

    Raises:
        EnvironmentFaultError: it cannot be loaded.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        own = own_command()
        command = [*own[:-1], _MODULE, str(folder), str(os.getpid())]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env=own_environment(),
            )
        self._input = cast(BinaryIO, self._process.stdin)
        self._output = cast(BinaryIO, self._process.stdout)
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        try:
            self.facts, _ = read_frame(self._output)
        except EOFError:
            self.close()
            raise EnvironmentFaultError(f"the model {folder}", "its process ended", f"See {log}.") from None
        finally:
            timer.cancel()
        if "error" in self.facts:
            self.close()
            raise EnvironmentFaultError(f"the model {folder}", self.facts["error"], self.facts["fix"])

    def compute(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        """Return the answers for a batch.

        Raises:
            EOFError: the process has ended.
        """
        try:
            shapes = [None if one.shape is None else list(one.shape) for one in pictures]
            header = {"shapes": shapes, "wants_map": [one.wants_map for one in pictures]}
            write_frame(self._input, header, [one.content for one in pictures])
        except OSError:
            raise EOFError from None
        said, _ = read_frame(self._output)
        answers: Sequence[Answer] = said["answers"]
        return answers

    def close(self) -> None:
        """End the process."""
        for stream in (self._input, self._output):
            with suppress(OSError):
                stream.close()
        self._process.kill()
        self._process.wait()


class HostClosedError(Exception):
    """The host takes no more requests: a newer version of its model has taken over."""


class ModelHost:
    """Answers requests for one version of a model.

    Args:
        folder: the model's folder.
        log: file for what its process prints.
        most_images: images of a batch.
        wait: seconds that a batch waits for more images.
    """

    def __init__(
        self, folder: Path, log: Path, *, most_images: int = MOST_IMAGES, wait: float = WAIT
    ) -> None:
        self._open: Callable[[], ModelProcess] = lambda: ModelProcess(folder, log)
        self._process: ModelProcess | None = self._open()
        self.facts: Mapping[str, Any] = self._process.facts
        self._most, self._wait = most_images, wait
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock, self._is_closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name=f"model {folder.name}", daemon=True)
        self._thread.start()

    def submit(self, pictures: Sequence[Picture]) -> list[Future[Answer]]:
        """Queue images; each answer has ``probabilities`` (K,) or a ``fault``.

        Raises:
            HostClosedError: a newer version has taken over.
        """
        waiting = [_Waiting(picture) for picture in pictures]
        with self._lock:  # nothing is queued behind the end, where nobody would answer it
            if self._is_closed:
                raise HostClosedError
            for one in waiting:
                self._queue.put(one)
        return [one.answer for one in waiting]

    def close(self) -> None:
        """Answer what waits, and end the process."""
        with self._lock:
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()
        if self._process is not None:
            self._process.close()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, is_last = self._fill([first])
            self._answer(batch)
            if is_last:
                return

    def _fill(self, batch: list[_Waiting]) -> tuple[list[_Waiting], bool]:
        """Add what arrives in time; return the batch, and whether the host is being closed."""
        deadline = time.monotonic() + self._wait
        while len(batch) < self._most:
            try:
                found = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if found is None:
                return batch, True
            batch.append(found)
        return batch, False

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            answers = self._compute([one.picture for one in batch])
        except EOFError:
            self._drop()
            if len(batch) == 1:
                batch[0].answer.set_result({"fault": "the process of the model ended over this image"})
                return
            for one in batch:
                self._answer([one])
            return
        except Exception as error:  # of starting the process again: the requests must not wait for ever
            for one in batch:
                one.answer.set_exception(error)
            return
        for one, answer in zip(batch, answers, strict=True):
            one.answer.set_result(answer)

    def _compute(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        if self._process is None:
            self._process = self._open()
        return self._process.compute(pictures)

    def _drop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
