"""Compare an exported artefact, loaded in a fresh process, with the network it was made from.

Shape legend: N inputs, K classes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import finetune
from finetune.data.transforms import Normalizer
from finetune.errors import DiskError, InternalError
from finetune.exporters import fresh
from finetune.exporters.deployed import Interface
from finetune.exporters.source import ProofInputs
from finetune.system.temporary import temporary_folder
from finetune.targets import compute_margins, decide, read_target
from pretrained.catalog import Card

TOLERANCE = 1e-4
"""Largest difference of a probability in float32 between a network and its exported form."""


@dataclass(frozen=True)
class OutputCheck:
    """The result of comparing two tables of probabilities (N, K).

    Attributes:
        max_difference: the largest difference of one probability.
        tolerance: exclusive upper limit of that difference.
        top1_identical: the most probable class is the same for every input except near ties.
        num_near_ties: inputs whose two most probable classes are closer than the tolerance.
        num_top1_differences: inputs whose most probable class differs, near ties included.
    """

    max_difference: float
    tolerance: float
    top1_identical: bool
    num_near_ties: int
    num_top1_differences: int

    @property
    def holds(self) -> bool:
        """Whether the tables agree within the tolerance."""
        return self.top1_identical and self.max_difference < self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for ``export.json``."""
        return asdict(self)


def compare(expected: Tensor, found: Tensor, tolerance: float = TOLERANCE) -> OutputCheck:
    """Compare probabilities.

    Args:
        expected: probabilities (N, K) of the network.
        found: probabilities (N, K) of the artefact; a NaN differs from everything.
        tolerance: exclusive upper limit of the difference of one probability.
    """
    near = compute_margins(expected) < tolerance
    differs = decide(expected) != decide(found)
    difference = (expected.double() - found.double()).abs().nan_to_num(nan=1.0).max()
    return OutputCheck(
        float(difference),
        tolerance,
        not bool((differs & ~near).any()),
        int(near.sum()),
        int(differs.sum()),
    )


def predict_here(network: nn.Module, card: Card, views: Tensor) -> Tensor:
    """Return probabilities (N, K) of a network on the CPU, float32, with the card's temperature."""
    normalize = Normalizer(card.preprocessing, torch.device("cpu"))
    with torch.inference_mode():
        logits = [network.eval()(normalize(batch)) for batch in torch.split(views, fresh.MOST)]
    return read_target(dict(card.target)).activate(torch.cat(logits) / card.temperature)


def predict_fresh(
    loader: str, artefact: Path, inputs: ProofInputs, card: Card, interface: Interface
) -> tuple[Tensor, dict[str, Any]]:
    """Return probabilities (N, K) of an artefact that a fresh process loads, and facts about that process.

    Args:
        loader: key of :data:`finetune.exporters.fresh.LOADERS`.
        artefact: file or folder.
        inputs: images to compare on.
        card: description of the network.
        interface: input and output of the artefact.

    Raises:
        InternalError: the process could not load or run it, or read other label names.
        DiskError: there is no space for the inputs or the outputs.
    """
    with _exchange() as folder:
        _write_inputs(folder / "inputs.npy", inputs.views, card, interface)
        _run(loader, artefact, folder)
        outputs = torch.from_numpy(np.load(folder / "outputs.npy", allow_pickle=False))
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    if loader != "finetune" and facts["loaded"]:
        found = f"the fresh process imported {', '.join(facts['loaded'])}, so it proves nothing"
        raise InternalError(f"exporting {artefact.name}", found, "Please report this.")
    if card.label_names and facts.get("label_names", list(card.label_names)) != list(card.label_names):
        found = f"{loader} reads other label names from it"
        raise InternalError(f"exporting {artefact.name}", found, "Please report this.")
    if outputs.shape != (len(inputs.views), card.num_classes):
        found = f"the fresh process gave {tuple(outputs.shape)} for {len(inputs.views)} inputs"
        raise InternalError(
            f"exporting {artefact.name}", found, "Please report this with the backbone's name."
        )
    activate = read_target(dict(card.target)).activate
    return outputs if interface.is_calibrated else activate(outputs / card.temperature), facts


def _write_inputs(path: Path, views: Tensor, card: Card, interface: Interface) -> None:
    """Write the inputs batch by batch: normalised images take four times the memory of their uint8 pixels.

    A memory-mapped file is not used, because a full disk would then raise a signal that ends the process.
    """
    dtype = np.dtype(interface.input_dtype)
    shape = (len(views), *interface.input_shape(card.preprocessing))
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in torch.split(views, fresh.MOST):
            file.write(np.ascontiguousarray(interface.arrange(batch, card.preprocessing), dtype).tobytes())


@contextmanager
def _exchange() -> Iterator[Path]:
    """Yield a temporary folder that both processes use.

    Raises:
        DiskError: it cannot be created, or the disk is full.
    """
    with temporary_folder("finetune-export-") as folder:
        try:
            yield folder
        except OSError as error:
            raise _no_room(str(folder.parent), error.strerror or str(error)) from None


def _no_room(parent: str, found: str) -> DiskError:
    fix = "Free some space there, or set TMPDIR to another folder, and start the same command again."
    return DiskError(f"writing images for the comparison into {parent}", found, fix)


def _run(loader: str, artefact: Path, folder: Path) -> None:
    command = [sys.executable, "-P", str(Path(fresh.__file__)), loader, str(artefact.absolute()), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if loader == "finetune":  # it may run from a checkout
        home = str(Path(finetune.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(  # noqa: S603 - our own file, with arguments as a list
        command, env=environment, capture_output=True, text=True, errors="backslashreplace", check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:300]
        if done.returncode == fresh.NO_ROOM:
            raise _no_room(str(folder.parent), reason)
        found = f"a fresh process could not load and run it: {reason}"
        raise InternalError(
            f"exporting {artefact.name}", found, "Please report this with the backbone's name."
        )


def check_comparison(asked: str, what: str, comparison: OutputCheck, num_inputs: int, source: str) -> None:
    """Raise an error if an artefact's outputs differ from those expected.

    Args:
        asked: what was exported, for the message.
        what: name of the outputs that it was compared with, for the message.
        comparison: result of the comparison.
        num_inputs: number of inputs compared.
        source: kind of the inputs: ``judged images`` or ``random inputs``.

    Raises:
        InternalError: the outputs differ; the message has the largest difference.
    """
    if comparison.holds:
        return
    found = (
        f"on {num_inputs} {source} its probabilities differ from {what} by up to "
        f"{comparison.max_difference:.3g} (under {comparison.tolerance:g} is allowed), and the most probable "
        f"class of {comparison.num_top1_differences} differs"
    )
    raise InternalError(asked, found, "Nothing was kept. Please report this with the backbone's name.")
