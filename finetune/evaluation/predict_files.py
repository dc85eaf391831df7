"""``finetune predict``: any number of images, one row each, written as they are known.

::

    inputs -> batches -> threads decode -> network -> rows, aside -> --output
                    a kill: the same command goes on after the last save, and ends in the same bytes

Batches are cut at the same places whether or not a run was interrupted: the last bits of a probability depend
on an image's neighbours.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune import __version__
from finetune.data.decode import BadImageError, decode_image
from finetune.data.inputs import Input, Inputs, find_inputs
from finetune.errors import DataError, InterruptedRunError, LostProcessError, UsageError
from finetune.evaluation.prediction_rows import Fingerprint, PredictionProgress, PredictionRows, find_format
from finetune.evaluation.predictor import Answer, Predictor, load, split_batches
from finetune.runs.claim import create_folder
from finetune.runs.files import escape_formula, format_csv_line
from finetune.runs.outcome import translated_errors
from finetune.runs.resumable_writer import ResumableWriter, bad_of, check_free, find_finished, open_writer
from finetune.system.device import available_cores, resolve_device, resolve_threads
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.signals import StopSignal
from pretrained.state_dict import digest_tensors

LINE_SECONDS = 60.0
"""Between two lines of progress where there is no terminal to draw a bar on."""
_SHOWN = 5


@dataclass(frozen=True)
class PredictRequest:
    """What the user wants; the words are those of the command line."""

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

    Of several processes the main one writes; batches go through all of them in turns.

    Returns:
        Counts, paths and speed, as ``--json`` prints them.

    Raises:
        FinetuneError: every refusal and failure, with its exit code (docs/errors.md).
    """
    with translated_errors(distributed=distributed):
        format = find_format(request.output, request.format)
        inputs = _find_inputs(request, distributed)
        with display.busy(f"loading {request.model}"):
            predictor = distributed.first(lambda: _load(request, distributed))
        display.say(f"{predictor.card.name}: {len(predictor.classes)} classes, on {predictor.device}")
        rows = PredictionRows(predictor.classes, format, request.top, request.reject_below)
        _check_top(request.top, len(predictor.classes))
        if not distributed.is_main:
            return _help(inputs, predictor, distributed)
        facts = _describe(request, predictor, rows)
        if before := find_finished(request.output, facts):
            distributed.share(lambda: None)
            display.say(f"{request.output} holds these predictions already")
            return _summarise(request, PredictionProgress(**before), 0.0)
        check_free(request.output)
        total = _count(inputs, display)
        create_folder(request.output.parent)
        with open_writer(request.output, facts) as writer:
            return _Work(request, inputs, predictor, rows, writer, display, total, distributed).run()


def _help(inputs: Inputs, predictor: Predictor, distributed: Distributed) -> dict[str, Any]:
    """Answer every batch whose turn this process has, from where the main one begins."""
    with StopSignal() as stop, stop.gently():
        start: int | None = distributed.receive()
        if start is not None:
            batches = split_batches(islice(inputs.open(), start, None), predictor.batch_size)
            own = islice(batches, distributed.rank, None, distributed.size)
            answers = predictor.answer(own, _open)
            list(distributed.merge(_until_stopped(answers, stop)))
    return {}


def _until_stopped(answers: Iterator[Answer[Input]], stop: StopSignal) -> Iterator[Answer[Input]]:
    """Give answers on; whoever asks this process to stop asks for the end of all, and of no list."""
    for answer in answers:
        yield answer
        if stop.asked:
            found = "one of its processes was asked to stop"
            raise InterruptedRunError("predicting", found, "Give the same command again to go on.")


def _find_inputs(request: PredictRequest, distributed: Distributed) -> Inputs:
    """Return the images; where they are walked over, what lies beside the output is refused."""
    if request.input == "-" and distributed.size > 1:
        fix = "Name a folder, a CSV file or a pattern, or drop --processes."
        raise UsageError("-", f"{distributed.size} processes cannot share standard input", fix)
    stream = getattr(sys.stdin, "buffer", None)  # it may be closed
    inputs = find_inputs(request.input, stream, nul=request.nul, follow_links=request.follow_links)
    if inputs.folder:
        _check_not_among(request.output, inputs.folder)
        return inputs
    return replace(inputs, open=lambda: _watch(inputs, request.output))


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


def _check_top(top: int, num_classes: int) -> None:
    if top > num_classes:
        found = f"the model has {num_classes} classes"
        raise UsageError(f"--top {top}", found, f"Take {num_classes} or fewer.")


def _describe(request: PredictRequest, predictor: Predictor, rows: PredictionRows) -> dict[str, Any]:
    """Return everything that a row depends on but the images, whose digest is kept as they come."""
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


# --- where nothing may be written ----------------------------------------------------------------


def _count(inputs: Inputs, display: Display) -> int | None:
    """Walk over all images once, which finds what is refused before anything is computed."""
    if not inputs.is_countable:
        return None
    with display.busy(f"looking through {inputs.asked}"):
        number = sum(1 for _ in inputs.open())
    if not number:
        raise _no_images(inputs)
    return number


def _watch(inputs: Inputs, output: Path) -> Iterator[Input]:
    """Give the images on, as long as the output does not lie in the folder of one."""
    home, last = os.path.realpath(inputs.home), inputs.home
    for one in inputs.open():
        folder = one.file.parent
        if folder != last and os.path.isfile(one.file):  # noqa: PTH113 - Path.is_file raises on long names
            if os.path.realpath(folder) != home:
                _check_not_among(output, folder)
            last = folder
        yield one


def _check_not_among(output: Path, folder: Path) -> None:
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(folder)):
        found, fix = f"it lies among the images, in {folder}", "Name an --output outside of it."
        raise UsageError(f"--output {output}", found, fix)


def _no_images(inputs: Inputs) -> DataError:
    return DataError(inputs.asked, "there are no images", "Name a file, a folder, a CSV file or a pattern.")


# --- the work ------------------------------------------------------------------------------------


@dataclass
class _Work:
    """One attempt at a file of predictions."""

    request: PredictRequest
    inputs: Inputs
    predictor: Predictor
    rows: PredictionRows
    writer: ResumableWriter
    display: Display
    total: int | None
    distributed: Distributed
    progress: PredictionProgress = field(default_factory=PredictionProgress)
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    def run(self) -> dict[str, Any]:
        """Look at every image that an earlier attempt has not, and give the files their names."""
        source = self._go_on()
        self.distributed.share(lambda: self.progress.done)
        began_at, began = self.progress.done, time.perf_counter()
        if not began_at:
            self.writer.write(self.rows.header())
        with StopSignal() as stop, stop.gently(), self._bar() as advance:
            try:
                for answer in self._answers(source):
                    self._write(answer)
                    self.writer.save(self.progress.to_dict())
                    speed = (self.progress.done - began_at) / (time.perf_counter() - began)
                    advance(len(answer.asked), f"{speed:.1f} images/s")
                    if stop.asked:
                        raise self._interrupted()
            except InterruptedRunError as error:
                found = self._interrupted()  # keeps what there is
                raise error if isinstance(error, LostProcessError) else found from None
        seconds = time.perf_counter() - began
        self._finish()
        self._report(seconds, began_at)
        return _summarise(self.request, self.progress, (self.progress.done - began_at) / max(seconds, 1e-9))

    def _go_on(self) -> Iterator[Input]:
        """Return the images that are left, after those that an earlier attempt looked at."""
        source, seen = self.inputs.open(), deque[Input](maxlen=0 if self.inputs.is_countable else None)
        if self.writer.is_another:
            self.display.say("an earlier attempt had another model or other options: starting anew")
        if self.writer.before is None:
            return source
        before = PredictionProgress(**self.writer.before)
        number = 0
        while number < before.done and (one := next(source, None)):
            self.fingerprint.add(one)
            seen.append(one)
            number += 1
        rest = next(source, None)
        is_cut_here = rest is None or number % self.predictor.batch_size == 0
        if number == before.done and self.fingerprint.value() == before.digest and is_cut_here:
            self.display.say(f"going on after {number:,} images")
            self.progress = before
            return chain([] if rest is None else [rest], source)
        self.display.say("the images are not those of an earlier attempt: starting anew")
        self.writer.start_anew()
        self.fingerprint = Fingerprint()
        if self.inputs.is_countable:
            return self.inputs.open()
        return chain(seen, [] if rest is None else [rest], source)

    def _answers(self, source: Iterator[Input]) -> Iterator[Answer[Input]]:
        """Yield what comes of each batch; by then, ``progress`` counts it."""
        taken: deque[tuple[list[Input], str]] = deque()

        def batches() -> Iterator[list[Input]]:
            for number, batch in enumerate(split_batches(source, self.predictor.batch_size)):
                for one in batch:
                    self.fingerprint.add(one)
                taken.append((batch, self.fingerprint.value()))
                if number % self.distributed.size == 0:  # the others have theirs from their own walk
                    yield batch

        for answer in self.distributed.merge(self.predictor.answer(batches(), _open)):
            batch, digest = taken.popleft()
            if list(answer.asked) != batch:
                fix = "Leave the images alone while they are predicted, and give the same command again."
                raise DataError(self.inputs.asked, "images came or went meanwhile", fix)
            self.progress.done += len(batch)
            self.progress.digest = digest
            yield answer

    def _write(self, answer: Answer[Input]) -> None:
        good = (one for place, one in enumerate(answer.asked) if place not in answer.faults)
        lines = [
            self.rows.line(one.path, values) for one, values in zip(good, answer.probabilities, strict=True)
        ]
        bad = [(answer.asked[place].path, reason) for place, reason in answer.faults.items()]
        listed = [format_csv_line([escape_formula(cell) for cell in row]) for row in bad]
        if bad and not self.progress.bad:
            listed.insert(0, format_csv_line(["path", "reason"]))
        for path, reason in bad[: max(0, _SHOWN - self.progress.bad)]:
            self.display.warn(f"{path} cannot be read: {reason}")
        self.writer.write(b"".join(lines), "".join(listed).encode())
        self.progress.bad += len(bad)
        self.progress.rejected += sum(map(self.rows.is_rejected, answer.probabilities))

    def _finish(self) -> None:
        progress = self.progress
        if not progress.done:
            raise _no_images(self.inputs)
        self.writer.save(progress.to_dict(), now=True)
        if progress.bad == progress.done:
            self.writer.discard()
            found = f"none of {progress.done:,} images can be read"
            fix = f"Why is in {self.writer.bad_target}."
            raise DataError(self.inputs.asked, found, fix)
        self.writer.finish(self.rows.convert if self.rows.format == "parquet" else None)

    def _report(self, seconds: float, began_at: int) -> None:
        progress, display = self.progress, self.display
        if progress.bad:
            images = "image has" if progress.bad == 1 else "images have"
            display.warn(f"{progress.bad:,} {images} no row; listed in {self.writer.bad_target}")
        if self.request.reject_below is not None:
            display.say(
                f"{progress.rejected:,} images have no label: confidence below {self.request.reject_below:g}"
            )
        speed = (progress.done - began_at) / max(seconds, 1e-9)
        rows = progress.done - progress.bad
        display.say(f"{rows:,} images, {speed:.1f} images/s: {self.request.output}", style="bold")

    def _interrupted(self) -> InterruptedRunError:
        self.writer.save(self.progress.to_dict(), now=True)
        of = f" of {self.total:,}" if self.total is not None else ""
        found = f"it was stopped after {self.progress.done:,}{of} images, which are kept"
        return InterruptedRunError("predicting", found, "Give the same command again to go on.")

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int, str], None]]:
        """Show progress: a bar on a terminal, a line a minute elsewhere."""
        if self.display.console.is_terminal:
            with self._terminal_bar() as advance:
                yield advance
            return
        last = time.monotonic()

        def tell(_: int, words: str) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                of = f" of {self.total:,}" if self.total is not None else ""
                self.display.say(f"{self.progress.done:,}{of} images, {words}")
                last = time.monotonic()

        yield tell

    @contextmanager
    def _terminal_bar(self) -> Iterator[Callable[[int, str], None]]:
        if self.total is not None:
            with self.display.track("predicting", self.total) as advance:
                advance(self.progress.done, "")
                yield advance
            return
        with self.display.count("predicting") as tell:  # nobody knows how many more will come
            yield lambda *_: tell(self.progress.done, self.progress.done)


def _open(one: Input) -> Image.Image:
    if one.fault:
        raise BadImageError(one.fault)
    return decode_image(one.file)


def _summarise(request: PredictRequest, progress: PredictionProgress, speed: float) -> dict[str, Any]:
    bad = bad_of(request.output)
    return {
        "state": "done",
        "output": str(request.output),
        "num_images": progress.done - progress.bad,
        "num_bad": progress.bad,
        "num_rejected": progress.rejected,
        "bad_images": str(bad) if progress.bad else None,
        "images_per_second": round(speed, 2),
    }
