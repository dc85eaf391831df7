"""The images that ``finetune predict`` reads, and the check that its output does not lie among them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO

from finetune.data.channels.other_values import TRIED, describe_other_values
from finetune.data.decode import BadImageError
from finetune.data.inputs import InputImage, InputImages, find_inputs
from finetune.data.layout import extensions
from finetune.data.transforms import Opened
from finetune.errors import DataError, UsageError
from finetune.evaluation.predictor import Predictor
from finetune.system.display import Display
from finetune.system.distributed import Distributed
from finetune.system.temporary import temporary_file


def find_prediction_inputs(
    asked: str, output: Path, distributed: Distributed, *, nul: bool = False, follow_links: bool = False
) -> InputImages:
    """Find the images to predict.

    Args:
        asked: the ``--input``: a file, a folder, a CSV file, a pattern, or ``-`` for paths on standard input.
        output: the file of predictions; it must lie outside the folders of the images.
        distributed: ranks that share the work.
        nul: paths on standard input end in a NUL byte instead of a line break.
        follow_links: read images through symbolic links that lead out of the folder.

    Raises:
        UsageError: the output lies among the images, or several processes would share standard input. If the
            images are not in one folder, the former is checked image by image while they are read.
        DataError: the input does not exist or cannot be read.
    """
    if asked == "-" and distributed.size > 1:
        fix = "Name a folder, a CSV file or a pattern, or drop --processes."
        raise UsageError("-", f"{distributed.size} processes cannot share standard input", fix)
    stream = getattr(sys.stdin, "buffer", None)  # standard input may be closed
    inputs = find_inputs(asked, stream, nul=nul, follow_links=follow_links)
    if inputs.folder:
        _check_outside(output, inputs.folder)
        return inputs
    return replace(inputs, open=lambda: _open_checked(inputs, output))


def list_inputs(inputs: InputImages, display: Display) -> tuple[InputImages, int | None]:
    """List all images in a temporary file, so that errors are reported before anything is computed.

    An image that is removed after that cannot be read; a second walk through its folder would overlook it.

    Returns:
        The images of the list, and their number; the same images and None for a stream, which can only be
        read once.

    Raises:
        UsageError: the output lies among the images.
        DataError: there are no images.
        DiskError: the list cannot be written.
    """
    if not inputs.is_countable:
        return inputs, None
    listed, number = temporary_file("w+", encoding="ascii"), 0  # closed with its last reader
    with display.busy(f"looking through {inputs.asked}"):
        for image in inputs.open():
            listed.write(json.dumps([image.path, str(image.file), image.fault]) + "\n")
            number += 1
    if not number:
        raise no_images(inputs)
    if left_out := str(inputs.left_out):
        display.warn(left_out)
    return replace(inputs, open=lambda: _read_list(listed)), number


def warn_of_values(predictor: Predictor, inputs: InputImages, number: int | None, display: Display) -> None:
    """Warn if the images hold other numbers than the model was trained on; some of them are looked at.

    Args:
        predictor: the model.
        inputs: the images.
        number: how many there are; None for a stream, which can only be read once and is not looked at.
        display: shows the warning.
    """
    if number is None:
        return
    chosen = islice(inputs.open(), 0, None, -(-number // TRIED))
    files = [image.file for image in chosen if not image.fault]
    if said := describe_other_values(predictor.card.preprocessing, files):
        display.warn(said)


def _read_list(listed: IO[str]) -> Iterator[InputImage]:
    listed.seek(0)
    for line in listed:
        path, file, fault = json.loads(line)
        yield InputImage(path, Path(file), fault)


def no_images(inputs: InputImages) -> DataError:
    """Return the error for an input without images."""
    found = f"there are no images{extensions(inputs.left_out.kinds, ', only ')}"
    return DataError(inputs.asked, found, "Name a file, a folder, a CSV file or a pattern.")


def open_input(predictor: Predictor, image: InputImage) -> Opened:
    """Decode one image, or read one array.

    Raises:
        BadImageError: it cannot be read or decoded.
    """
    if image.fault:
        raise BadImageError(image.fault)
    return predictor.open(image.file)


def _open_checked(inputs: InputImages, output: Path) -> Iterator[InputImage]:
    """Yield the images; raise a UsageError at the first one whose folder contains the output."""
    home, last = os.path.realpath(inputs.home), inputs.home
    for image in inputs.open():
        folder = image.file.parent
        if folder != last and os.path.isfile(image.file):  # noqa: PTH113 - Path.is_file raises on long names
            if os.path.realpath(folder) != home:
                _check_outside(output, folder)
            last = folder
        yield image


def _check_outside(output: Path, folder: Path) -> None:
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(folder)):
        found, fix = f"it lies among the images, in {folder}", "Name an --output outside of it."
        raise UsageError(f"--output {output}", found, fix)
