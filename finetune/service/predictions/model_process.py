"""The process of a model: reads batches of images on its standard input, answers on its standard output.

    python -m finetune.service.predictions.model_process FOLDER SERVER        SERVER: id of its process

An image that ends the process, or takes all memory, ends this process and not the server.
"""

from __future__ import annotations

import base64
import copy
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import FinetuneError
from finetune.service.predictions.frames import read_frame, write_frame
from finetune.system.signals import end_with_parent
from finetune.system.temporary import temporary_folder
from finetune.targets import rank_classes

_NUMPY = b"\x93NUMPY"
_MANY = 100_000
"""Images that a model is expected to predict here: an export pays, if the network gains by one."""


def main() -> None:
    """Answer until the server closes the pipe."""
    end_with_parent(int(sys.argv[2]))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log
    serve(Path(sys.argv[1]), sys.stdin.buffer, answers)


def serve(folder: Path, requests: BinaryIO, answers: BinaryIO) -> None:
    """Load a model, say that it is ready, and answer requests."""
    with temporary_folder("finetune-model-") as images:
        try:
            model = _Model(folder, Path(images))
        except FinetuneError as error:
            write_frame(answers, {"error": error.message, "fix": error.fix})
            return
        write_frame(answers, model.describe())
        with suppress(EOFError):
            while True:
                write_frame(answers, model.answer(*read_frame(requests)))


class _Model:
    """A model in this process.

    Args:
        model: its folder.
        folder: for images while they are decoded.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        from finetune.evaluation.predictor import load
        from finetune.system.display import SilentDisplay

        predictor = load(str(model), workers=2)
        self._predictor, self._folder = predictor.with_runtime_for(_MANY, SilentDisplay()), folder
        self._explainer: Any = None

    def describe(self) -> dict[str, Any]:
        """Return what the server says of the model."""
        card = self._predictor.card
        size = list(card.preprocessing.input_size)
        return {
            "classes": list(self._predictor.classes),
            "input_size": size,
            "architecture": card.architecture,
            "has_classes": self._predictor.target.has_classes,
        }

    def answer(self, header: dict[str, Any], blocks: list[bytes]) -> dict[str, Any]:
        """Return, for each image, its label and probabilities (or number), or why it cannot be read.

        Args:
            header: ``shapes``, for each image null (an encoded file) or height and width of RGB pixels; and
                ``wants_map``, for each whether a heat map is drawn.
            blocks: the images.
        """
        images = list(zip(header["shapes"], blocks, strict=True))
        [result] = self._predictor.predict_batches([images], self._open)
        rows = iter(result.probabilities)
        answers: list[dict[str, Any]] = []
        for index, (image, wants_map) in enumerate(zip(images, header["wants_map"], strict=True)):
            if fault := result.faults.get(index):
                answers.append({"fault": fault})
                continue
            values = next(rows)
            classes = self._predictor.classes
            label, confidence = self._predictor.target.answer(values, classes)
            answers.append({"label": label, "confidence": confidence, "probabilities": values.tolist()})
            if wants_map:
                answers[-1] |= self._draw_map(image, classes[rank_classes(values, 1)[0]])
        return {"answers": answers}

    def _draw_map(self, image: tuple[list[int] | None, bytes], label: str) -> dict[str, Any]:
        """Return the heat map of a class over the image, as JPEG in base64; or why there is none.

        A map that fails the checks of the report is left out.
        """
        from finetune.data.transforms import draw_view
        from finetune.plots.overlay import draw_overlay
        from finetune.report.images import Explainer, encode

        if self._explainer is None:
            network = copy.deepcopy(self._predictor.network).cpu()  # where maps are computed
            self._explainer = Explainer(network, self._predictor.card)
        view = self._explainer.transform(self._open(image))
        [[heat]] = self._explainer.explain([view], [label])
        if heat.values is None:
            return {"heat_map": None, "heat_map_missing": heat.reason}
        drawn = draw_overlay(draw_view(view), heat.values.numpy())
        return {"heat_map": base64.b64encode(encode(drawn)).decode()}

    def _open(self, image: tuple[list[int] | None, bytes]) -> Any:
        """Return the RGB image of a block.

        Raises:
            BadImageError: it cannot be decoded.
        """
        from PIL import Image

        shape, content = image
        if shape is not None:
            height, width = shape
            opened = Image.frombytes("RGB", (width, height), content)
            return opened if self._predictor.card.preprocessing.is_rgb else self._predictor.open(opened)
        suffix = ".npy" if content.startswith(_NUMPY) else ""
        # Decoders are bounded by what they read of a file.
        file = self._folder / f"{secrets.token_hex(8)}{suffix}"
        file.write_bytes(content)
        try:
            return self._predictor.open(file)
        finally:
            file.unlink()


if __name__ == "__main__":
    main()
