"""What is to be exported: words of a command line, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from finetune.errors import UsageError, suggest
from finetune.export.deployed import LAYOUTS, Interface, Layout
from finetune.export.graph_files import OPSETS

Format = Literal["timm", "onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Wanted:
    """What is to be made.

    Attributes:
        format: of the artefact.
        interface: of a graph; timm's format holds weights, and has none.
        opset: of ONNX.
    """

    format: Format
    interface: Interface
    opset: int = OPSETS[0]


def read_wanted(format: str, layout: str | None, softmax: bool, opset: int | None) -> Wanted:
    """Return what words of the command line mean.

    Raises:
        UsageError: an unknown word, or two that do not go together.
    """
    known = next((one for one in FORMATS if one == format), None)
    if known is None:
        found = f"there is no such format{suggest(format, FORMATS)}"
        raise UsageError(f"--format {format}", found, f"Take {', '.join(FORMATS)}.")
    if known == "timm" and (layout or softmax):
        flag = "--with-preprocessing" if layout else "--with-softmax"
        fix = "Take --format onnx or torch-export."
        raise UsageError(flag, "timm's format holds weights, and no graph to put that into", fix)
    if opset is not None and known != "onnx":
        raise UsageError(f"--opset {opset}", f"--format {known} has none", "Leave it out.")
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        fix = f"Take {OPSETS[0]} to {OPSETS[1]}."
        raise UsageError(f"--opset {opset}", "torch's exporter does not write it", fix)
    return Wanted(known, Interface(_read_layout(layout), softmax), opset or OPSETS[0])


def _read_layout(word: str | None) -> Layout | None:
    found = next((layout for layout in LAYOUTS if layout == word), None)
    if word is not None and found is None:
        fix = f"Take {' or '.join(LAYOUTS)}."
        raise UsageError(f"--with-preprocessing {word}", "there is no such layout of pictures", fix)
    return found
