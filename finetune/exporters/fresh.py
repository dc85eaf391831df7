"""A program of its own: load an exported artefact with nothing but its own library, and answer inputs.

``python -P fresh.py LOADER ARTEFACT FOLDER`` reads ``inputs.npy`` of the folder and writes ``outputs.npy``
and ``facts.json`` there. It is run as a file, so that nothing of finetune is imported but for the loader
``finetune``, which is for networks that no other library builds.

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
"""numpy's array; its own type has parameters that say nothing here."""
Facts: TypeAlias = dict[str, Any]
Answer = Callable[[Array], Array]

BATCHES = (1, 3)
"""Sizes of the first batches, before those of :data:`MOST`: a size that the export fixed shows at once."""
MOST = 16
"""Inputs of a batch."""
NO_ROOM = 74
"""Exit code where the answers cannot be written."""


def load_timm(path: str) -> tuple[Answer, Facts]:
    """Load a folder of timm's format with plain timm."""
    import timm

    network = timm.create_model(f"local-dir:{path}", pretrained=True)
    return _in_torch(network.eval()), {"timm": timm.__version__}


def load_finetune(path: str) -> tuple[Answer, Facts]:
    """Load a folder that timm cannot build with the code that wrote it."""
    from finetune import __version__
    from finetune.exporters.folder import load_exported

    return _in_torch(load_exported(Path(path))), {"finetune": __version__}


def load_torch_export(path: str) -> tuple[Answer, Facts]:
    """Load a ``.pt2`` file with torch alone."""
    import torch

    program = torch.export.load(path)
    names = list(program.graph_signature.user_inputs)
    return _in_torch(program.module()), {"input_names": names}


def load_onnx(path: str) -> tuple[Answer, Facts]:
    """Load an ONNX file with onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    facts = {"onnxruntime": onnxruntime.__version__}
    return lambda inputs: session.run(None, {name: inputs})[0], facts


LOADERS = {
    "timm": load_timm,
    "finetune": load_finetune,
    "torch-export": load_torch_export,
    "onnx": load_onnx,
}


def _in_torch(network: Callable[[Any], Any]) -> Answer:
    import torch

    def answer(inputs: Array) -> Array:
        with torch.no_grad():
            return network(torch.from_numpy(inputs)).numpy()

    return answer


def split(count: int) -> Iterator[slice]:
    """Yield the parts of ``count`` inputs that are answered together."""
    start = 0
    sizes = iter(BATCHES)
    while start < count:
        stop = min(count, start + next(sizes, MOST))
        yield slice(start, stop)
        start = stop


def main(loader: str, path: str, folder: Path) -> None:
    """Answer the inputs of a folder."""
    answer, facts = LOADERS[loader](path)
    inputs = np.load(folder / "inputs.npy", mmap_mode="r", allow_pickle=False)
    outputs = [np.asarray(answer(np.array(inputs[part]))) for part in split(len(inputs))]
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"finetune", "pretrained"})
    try:
        np.save(folder / "outputs.npy", np.concatenate(outputs), allow_pickle=False)
        (folder / "facts.json").write_text(json.dumps(facts | {"loaded": loaded}), encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        sys.exit(NO_ROOM)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
