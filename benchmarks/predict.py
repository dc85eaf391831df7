"""What `finetune predict` makes of a network's own speed, and whether its memory grows with the files.

    python -m benchmarks.predict --model ./runs/ants --images ./photos --files 2000 10000

Links to a few hundred images stand for so many files: each of them is opened, decoded and resized anew.
The network alone (views in memory) and decoding alone (in as many threads) are measured beside the command.
Where both need the same cores, nothing is faster than 1 / (1 / network + 1 / decoding) images a second, with
each measured on all cores. Processor time says the same on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch

from finetune.data.decode import EXTENSIONS, BadImageError, decode_image
from finetune.data.transforms import build_eval_transform
from finetune.evaluation.predictor import Predictor, load
from finetune.system.device import available_cores, resolve_threads

COLUMNS = (
    "files",
    "images/s",
    "of the network alone",
    "of the limit",
    "processor ms an image",
    "network and decoding alone",
    "peak MB",
)


class Pace(NamedTuple):
    """Images a second, and milliseconds of processor time an image."""

    speed: float
    milliseconds: float


class Command(NamedTuple):
    """What a whole process took: processor seconds, peak memory in MB, and images a second of its loop."""

    processor: float
    peak: float
    speed: float


def find_images(folder: Path) -> list[Path]:
    """Return the images below a folder that can be decoded."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS:
            try:
                decode_image(path)
            except BadImageError:
                continue
            found.append(path.absolute())
    return found


def link(images: list[Path], folder: Path, number: int) -> None:
    """Fill a folder with links to images, a thousand a sub-folder."""
    for place, image in enumerate(islice(cycle(images), number)):
        below = folder / f"{place // 1000:04}"
        below.mkdir(exist_ok=True, parents=True)
        (below / f"{place:06}{image.suffix}").symlink_to(image)


def measure(work: Callable[[], int], seconds: float) -> Pace:
    """Repeat work that returns its number of images, for so many seconds, after once for nothing."""
    work()
    began, used, number = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        number += work()
    return Pace(number / (time.perf_counter() - began), 1000 * (time.process_time() - used) / number)


def measure_parts(predictor: Predictor, images: list[Path], workers: int, seconds: float) -> list[Pace]:
    """Return the pace of the network alone, and that of decoding and resizing alone."""
    view = build_eval_transform(predictor.card.preprocessing)
    views = [view(view.open(path))[None] for path in images[: predictor.batch_size]]
    with ThreadPoolExecutor(workers) as pool:
        works: list[Callable[[], int]] = [
            lambda: len(predictor.compute(views)),
            lambda: sum(1 for _ in pool.map(lambda path: view(view.open(path)), images)),
        ]
        return [measure(work, seconds) for work in works]


def run_command(model: Path, files: Path, output: Path, workers: int) -> Command:
    """Predict every file, in a process of its own."""
    words = [sys.executable, "-m", "finetune", "predict", str(model), str(files), "--follow-links", "--json"]
    words += ["--output", str(output), "--workers", str(workers)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)  # noqa: S603 - fixed words
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    used, speed = usage.ru_utime + usage.ru_stime, json.loads(said)["images_per_second"]
    return Command(used, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6, speed)


def measure_command(options: argparse.Namespace, images: list[Path], number: int) -> Command:
    """Predict so many files."""
    with tempfile.TemporaryDirectory() as place:
        link(images, Path(place) / "files", number)
        return run_command(options.model, Path(place) / "files", Path(place) / "out.csv", options.workers)


def main() -> None:
    """Print the parts alone, then a row for each number of files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--files", type=int, nargs="+", default=[2000, 10000])
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--seconds", type=float, default=20.0, help="for each part alone")
    options = parser.parse_args()
    torch.set_num_threads(resolve_threads())
    images = find_images(options.images)
    say(f"{len(images)} images, {torch.get_num_threads()} threads, {options.workers} that decode")
    network, decoding = measure_parts(load(options.model), images, options.workers, options.seconds)
    limit, alone = 1 / (1 / network.speed + 1 / decoding.speed), network.milliseconds + decoding.milliseconds
    for name, pace in (("network", network), ("decoding", decoding)):
        say(f"{name} alone: {pace.speed:.1f} images/s, {pace.milliseconds:.1f} ms of processor time an image")
    say(f"limit of both on the same cores: {limit:.1f} images/s")
    say(f"| {' | '.join(COLUMNS)} |")
    start = measure_command(options, images, 1).processor  # of imports and loading
    for number in options.files:
        found = measure_command(options, images, number)
        share, of_limit = found.speed / network.speed, found.speed / limit
        used = 1000 * (found.processor - start) / number
        cells = (f"{number:,}", f"{found.speed:.1f}", f"{share:.0%}", f"{of_limit:.0%}", f"{used:.1f}")
        say(f"| {' | '.join([*cells, f'{alone:.1f}', f'{found.peak:,.0f}'])} |")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
