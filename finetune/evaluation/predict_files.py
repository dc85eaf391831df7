"""``finetune predict``: one row for each of any number of images, written as soon as it is computed.

::

    inputs -> batches -> threads decode -> network -> rows in a temporary file -> --output
                    after a kill, the same command resumes after the last save; the bytes are the same

Batches hold the same images whether or not a prediction was interrupted: the last bits of a probability
depend on the other images of its batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from finetune import __version__
from finetune.data.inputs import InputImage, InputImages
from finetune.errors import DataError, InterruptedRunError, LostProcessError, count
from finetune.evaluation.prediction_inputs import (
    find_prediction_inputs,
    list_inputs,
    no_images,
    open_input,
    warn_of_values,
)
from finetune.evaluation.prediction_rows import Fingerprint, PredictionProgress, PredictionRows, find_format
from finetune.evaluation.predictor import BatchResult, Predictor, load, split_batches
from finetune.runs.claim import create_folder
from finetune.runs.files import escape_formula, format_csv_line
from finetune.runs.outcome import translated_errors
from finetune.runs.resumable_writer import ResumableWriter, bad_of, check_free, find_finished, open_writer
from finetune.system.device import available_cores, resolve_device, resolve_threads
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.gpu import explain_unused_gpu
from finetune.system.signals import StopSignal
from pretrained.state_dict import digest_tensors

LINE_SECONDS = 60.0
"""Seconds between two lines of progress if the output is not a terminal."""

_SHOWN = 5
"""Largest number of unreadable images named in a warning; the file lists all."""


@dataclass(frozen=True)
class PredictRequest:
    """The options of ``finetune predict``."""

    model: str
    input: str
    output: Path
    format: str | None = None
    top: int = 1
    reject_below: float | None = None
    crops: int = 1
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    nul: bool = False
    follow_links: bool = False
    offline: bool = False


def predict_files(
    request: PredictRequest, display: Display, distributed: Distributed = SINGLE_PROCESS
) -> dict[str, Any]:
    """Write one row for each image that can be read, and list the others.

    Every rank calls this with the same request: ranks take batches in turns, and rank 0 writes.

    Args:
        request: options of the command.
        display: shows progress; silent on all ranks but rank 0.
        distributed: ranks that share the images.

    Returns:
        Counts, paths and images per second, as ``--json`` prints them; empty on all ranks but rank 0.

    Raises:
        FinetuneError: the prediction fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors(distributed=distributed), ExitStack() as files:
        format = find_format(request.output, request.format)
        inputs = find_prediction_inputs(
            request.input,
            request.output,
            distributed,
            nul=request.nul,
            follow_links=request.follow_links,
        )
        if obstacle := explain_unused_gpu(request.device):
            display.warn(obstacle)
        with display.busy(f"loading {request.model}"):
            predictor = distributed.first(lambda: _load(request, distributed))
        display.say(f"{predictor.card.name}: {len(predictor.classes)} classes, on {predictor.device}")
        target = predictor.target
        rows = PredictionRows(predictor.classes, format, request.top, request.reject_below, target)
        rows.check_options()
        table = _Table(request, inputs, predictor, rows, display)
        with StopSignal(gentle=not distributed.is_main) as stop:
            start = distributed.share(lambda: table.open(files))
            if start is None:
                return table.summarise(0.0) if distributed.is_main else {}
            predictor = predictor.with_runtime_for(distributed.share(lambda: table.total or 0), display)
            began, opened = time.perf_counter(), partial(open_input, predictor)
            with stop.gently(), table.bar() as advance:
                results = predictor.predict_batches(table.batches(start, distributed), opened)
                try:
                    for result in distributed.merge(_until_stopped(results, stop)):
                        table.write(result)
                        speed = (table.progress.done - start) / (time.perf_counter() - began)
                        advance(len(result.inputs), f"{speed:.1f} images/s")
                except InterruptedRunError as error:
                    raise table.keep_interrupted(error) from None
        return table.finish(start, time.perf_counter() - began) if distributed.is_main else {}


def _until_stopped(
    results: Iterator[BatchResult[InputImage]], stop: StopSignal
) -> Iterator[BatchResult[InputImage]]:
    """Yield the results until this process is asked to stop.

    Raises:
        InterruptedRunError: it was asked to stop. All ranks end, so that no rank takes the list for complete.
    """
    for result in results:
        yield result
        if stop.asked:
            found = "one of its processes was asked to stop"
            raise InterruptedRunError("predicting", found, "Give the same command again to resume.")


def _load(request: PredictRequest, distributed: Distributed) -> Predictor:
    torch.set_num_threads(resolve_threads(distributed.machine.size))
    return load(
        request.model,
        device=str(resolve_device(request.device, distributed)),
        batch_size=request.batch_size,
        workers=request.workers or max(1, available_cores() // distributed.machine.size),
        crops=request.crops,
        offline=request.offline,
    )


def _describe(request: PredictRequest, predictor: Predictor, rows: PredictionRows) -> dict[str, Any]:
    """Return everything that a row depends on, except for the images (:class:`Fingerprint`)."""
    card = predictor.card
    return {
        "finetune": __version__,
        "weights": digest_tensors(predictor.network, ()),
        "preprocessing": card.preprocessing.to_dict(),
        "temperature": card.temperature,
        "classes": list(predictor.classes),
        "format": rows.format,
        "top": request.top,
        "reject_below": request.reject_below,
        "crops": request.crops,
        "batch_size": predictor.batch_size,
        "device": predictor.device.type,
    }


# --- the work ------------------------------------------------------------------------------------


@dataclass
class _Table:
    """One attempt to write the file of predictions. Only rank 0 opens and writes it.

    Attributes:
        total: number of images; None before the file is open, and for paths on standard input.
    """

    request: PredictRequest
    inputs: InputImages
    predictor: Predictor
    rows: PredictionRows
    display: Display
    progress: PredictionProgress = field(default_factory=PredictionProgress)
    _fingerprint: Fingerprint = field(default_factory=Fingerprint)
    _taken: deque[tuple[list[InputImage], str]] = field(default_factory=deque)
    _writer: ResumableWriter | None = None
    _left: Iterator[InputImage] = field(default_factory=lambda: iter(()))
    total: int | None = None

    @property
    def writer(self) -> ResumableWriter:
        """The open files; on rank 0 only."""
        assert self._writer is not None
        return self._writer

    def open(self, files: ExitStack) -> int | None:
        """Open the files and continue after what an earlier attempt wrote; the stack closes them.

        Returns:
            The number of images that an earlier attempt predicted; None if it predicted all of them.

        Raises:
            UsageError: the output exists and is something else, or another process writes it.
            DataError: there are no images.
        """
        output = self.request.output
        facts = _describe(self.request, self.predictor, self.rows)
        if finished := PredictionProgress.read(find_finished(output, facts)):
            self.display.say(f"{output} already holds these predictions")
            self.progress = finished
            return None
        check_free(output)
        self.inputs, self.total = list_inputs(self.inputs, self.display)
        warn_of_values(self.predictor, self.inputs, self.total, self.display)
        create_folder(output.parent)
        self._writer = files.enter_context(open_writer(output, facts))
        self._left = self._resume()
        if not self.progress.done:
            self.writer.write(self.rows.header())
        return self.progress.done

    def _resume(self) -> Iterator[InputImage]:
        """Return the images that an earlier attempt did not predict; all of them if it cannot be resumed."""
        source, seen = self.inputs.open(), deque[InputImage](maxlen=0 if self.inputs.is_countable else None)
        if self.writer.is_another:
            self.display.say("an earlier attempt had another model or other options: starting anew")
        if self.writer.before is None:
            return source
        before = PredictionProgress.read(self.writer.before)
        if before is None:
            self.display.say("the progress of an earlier attempt is damaged: starting anew")
            self.writer.start_anew()
            return source
        number = 0
        while number < before.done and (image := next(source, None)):
            self._fingerprint.add(image)
            seen.append(image)
            number += 1
        rest = next(source, None)
        is_cut_here = rest is None or number % self.predictor.batch_size == 0
        if number == before.done and self._fingerprint.value() == before.digest and is_cut_here:
            self.display.say(f"resuming after {count(number, 'image')}")
            self.progress = before
            return chain([] if rest is None else [rest], source)
        self.display.say("the images changed since an earlier attempt: starting anew")
        self.writer.start_anew()
        self._fingerprint = Fingerprint()
        if self.inputs.is_countable:
            return self.inputs.open()
        return chain(seen, [] if rest is None else [rest], source)

    def batches(self, start: int, distributed: Distributed) -> Iterator[list[InputImage]]:
        """Yield the batches of this rank; rank 0 also records those of all ranks.

        Args:
            start: number of images that an earlier attempt predicted.
            distributed: ranks that share the images.
        """
        left = self._left if distributed.is_main else islice(self.inputs.open(), start, None)
        for number, batch in enumerate(split_batches(left, self.predictor.batch_size)):
            if distributed.is_main:
                for image in batch:
                    self._fingerprint.add(image)
                self._taken.append((batch, self._fingerprint.value()))
            if number % distributed.size == distributed.rank:
                yield batch

    def write(self, result: BatchResult[InputImage]) -> None:
        """Write the rows of the next batch, and save the progress every few seconds.

        Raises:
            DataError: another rank found other images, since they changed meanwhile.
        """
        batch, digest = self._taken.popleft()
        if list(result.inputs) != batch:
            fix = "Do not change the images during prediction, and give the same command again."
            raise DataError(self.inputs.asked, "images were added or removed meanwhile", fix)
        self.progress.done += len(batch)
        self.progress.digest = digest
        self._write_rows(result)
        self.writer.save(self.progress.to_dict())

    def _write_rows(self, result: BatchResult[InputImage]) -> None:
        good = (image for index, image in enumerate(result.inputs) if index not in result.faults)
        lines = [
            self.rows.line(image.path, values)
            for image, values in zip(good, result.probabilities, strict=True)
        ]
        bad = [(result.inputs[index].path, reason) for index, reason in result.faults.items()]
        listed = [format_csv_line([escape_formula(cell) for cell in row]) for row in bad]
        if bad and not self.progress.bad:
            listed.insert(0, format_csv_line(["path", "reason"]))
        for path, reason in bad[: max(0, _SHOWN - self.progress.bad)]:
            self.display.warn(f"{path} cannot be read: {reason}")
        self.writer.write(b"".join(lines), "".join(listed).encode())
        self.progress.bad += len(bad)
        self.progress.rejected += sum(map(self.rows.is_rejected, result.probabilities))

    def finish(self, start: int, seconds: float) -> dict[str, Any]:
        """Rename the files to their final names, and report their content.

        Args:
            start: number of images that an earlier attempt predicted.
            seconds: time that the other images took.

        Raises:
            DataError: there were no images, or none could be read.
        """
        progress = self.progress
        if not progress.done:
            raise no_images(self.inputs)
        self.writer.save(progress.to_dict(), now=True)
        if progress.bad == progress.done:
            self.writer.discard()
            found = f"none of {count(progress.done, 'image')} can be read"
            fix = f"See the reasons in {self.writer.bad_target}."
            raise DataError(self.inputs.asked, found, fix)
        self.writer.finish(self.rows.convert if self.rows.format == "parquet" else None)
        speed = (progress.done - start) / max(seconds, 1e-9)
        self._report(speed)
        return self.summarise(speed)

    def _report(self, speed: float) -> None:
        progress, display = self.progress, self.display
        if progress.bad:
            images = count(progress.bad, "image has", "images have")
            display.warn(f"{images} no row; listed in {self.writer.bad_target}")
        if self.request.reject_below is not None:
            display.say(
                f"{count(progress.rejected, 'image has', 'images have')} no label: confidence below "
                f"{self.request.reject_below:g}"
            )
        rows = progress.done - progress.bad
        display.say(f"{count(rows, 'image')}, {speed:.1f} images/s: {self.request.output}", style="bold")

    def summarise(self, speed: float) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        progress = self.progress
        return {
            "state": "done",
            "output": str(self.request.output),
            "num_images": progress.done - progress.bad,
            "num_bad": progress.bad,
            "num_rejected": progress.rejected,
            "bad_images": str(bad_of(self.request.output)) if progress.bad else None,
            "images_per_second": round(speed, 2),
        }

    def keep_interrupted(self, error: InterruptedRunError) -> InterruptedRunError:
        """Save the rows so far, on rank 0; return the error to raise."""
        if self._writer is None:
            return error
        self.writer.save(self.progress.to_dict(), now=True)
        if isinstance(error, LostProcessError):
            return error
        found = f"it was stopped after {self._describe_progress()}, which are kept"
        return InterruptedRunError("predicting", found, "Give the same command again to resume.")

    def _describe_progress(self) -> str:
        """Return the number of images done, of all where that is known."""
        if self.total is None:
            return count(self.progress.done, "image")
        return f"{self.progress.done:,} of {count(self.total, 'image')}"

    @contextmanager
    def bar(self) -> Iterator[Callable[[int, str], None]]:
        """Show progress: a bar on a terminal, elsewhere a line per minute."""
        if self.display.console.is_terminal:
            with self._terminal_bar() as advance:
                yield advance
            return
        last = time.monotonic()

        def report(_: int, speed: str) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                self.display.say(f"{self._describe_progress()}, {speed}")
                last = time.monotonic()

        yield report

    @contextmanager
    def _terminal_bar(self) -> Iterator[Callable[[int, str], None]]:
        if self.total is not None:
            with self.display.track("predicting", self.total) as advance:
                advance(self.progress.done, "")
                yield advance
            return
        with self.display.count("predicting") as report:  # the total of a stream is unknown
            yield lambda *_: report(self.progress.done, self.progress.done)
