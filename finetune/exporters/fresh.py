"""A separate program that loads an exported artefact with only the library it is made for, and runs it.

``python -P fresh.py LOADER ARTEFACT FOLDER`` reads ``inputs.npy`` of the folder and writes ``outputs.npy``
and ``facts.json`` there. It runs as a file, so that it imports nothing of finetune; only the loader
``finetune``, for networks that no other library builds, does.

Shape legend: N inputs, K classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A numpy array of any shape and type."""
Facts: TypeAlias = dict[str, Any]
Model = Callable[[Array], Array]

BATCHES = (1, 3)
"""Sizes of the first batches. They differ, so that a graph with a fixed batch size fails at once."""
MOST = 16
"""Size of the other batches."""
NO_ROOM = 74
"""Exit code if the outputs cannot be written."""


def load_timm(path: str) -> tuple[Model, Facts]:
    """Load a folder of timm's format with plain timm."""
    import timm

    network = timm.create_model(f"local-dir:{path}", pretrained=True)
    return _in_torch(network.eval()), {"timm": timm.__version__}


def load_transformers(path: str) -> tuple[Model, Facts]:
    """Load a folder of timm's format with transformers, which wraps timm's network."""
    import transformers

    network = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
    names = network.config.id2label
    facts = {
        "transformers": transformers.__version__,
        "label_names": [names[index] for index in range(len(names))],
    }
    return _in_torch(lambda images: network(pixel_values=images).logits), facts


def load_finetune(path: str) -> tuple[Model, Facts]:
    """Load a folder that timm cannot build, with finetune itself."""
    from finetune import __version__
    from finetune.exporters.folder import load_exported

    return _in_torch(load_exported(Path(path))), {"finetune": __version__}


def load_torch_export(path: str) -> tuple[Model, Facts]:
    """Load a ``.pt2`` file with torch alone."""
    import torch

    program = torch.export.load(path)
    names = list(program.graph_signature.user_inputs)
    return _in_torch(program.module()), {"input_names": names}


def load_onnx(path: str) -> tuple[Model, Facts]:
    """Load an ONNX file with onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    facts = {"onnxruntime": onnxruntime.__version__}
    return lambda inputs: session.run(None, {name: inputs})[0], facts


LOADERS = {
    "timm": load_timm,
    "transformers": load_transformers,
    "finetune": load_finetune,
    "torch-export": load_torch_export,
    "onnx": load_onnx,
}


def _in_torch(network: Callable[[Any], Any]) -> Model:
    import torch

    def run(inputs: Array) -> Array:
        with torch.no_grad():
            return network(torch.from_numpy(inputs)).numpy()

    return run


def slice_batches(count: int) -> Iterator[slice]:
    """Yield the slices of ``count`` inputs that form the batches."""
    start = 0
    sizes = iter(BATCHES)
    while start < count:
        stop = min(count, start + next(sizes, MOST))
        yield slice(start, stop)
        start = stop


def main(loader: str, path: str, folder: Path) -> None:
    """Run the inputs of a folder through an artefact."""
    model, facts = LOADERS[loader](path)
    inputs = np.load(folder / "inputs.npy", mmap_mode="r", allow_pickle=False)
    outputs = [np.asarray(model(np.array(inputs[batch]))) for batch in slice_batches(len(inputs))]
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"finetune", "pretrained"})
    try:
        np.save(folder / "outputs.npy", np.concatenate(outputs), allow_pickle=False)
        (folder / "facts.json").write_text(json.dumps(facts | {"loaded": loaded}), encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        sys.exit(NO_ROOM)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
