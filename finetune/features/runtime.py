"""The runtime of a frozen network: eager torch, or ONNX Runtime on a CPU.

Eager torch runs each layer by itself. ONNX Runtime fuses convolution, BatchNorm and activation, and keeps the
channels in blocks between layers. EfficientNet-Lite0 is twice as fast with it, a ViT hardly (docs/cache.md).
Features differ by 1e-6 of the largest one.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from finetune.data.loader import Placement
from finetune.errors import UsageError
from finetune.features.store import Forward
from finetune.recipe import Auto, Runtime
from finetune.system.device import Precision
from finetune.system.display import Display
from pretrained.network import is_convolutional

LEAST_PIXELS = 200 * 224**2
"""Pixels from which an export, of one or two seconds, saves more than it costs."""
LARGEST_BYTES = 1_900_000_000
"""Most bytes of weights that are exported: a protobuf may have at most 2 GiB."""
TOLERANCE = (1e-3, 1e-5)
"""Largest difference from torch: as a share of the feature, plus a share of the largest one (usual: 1e-6)."""
_OPSET = 17


def choose_runtime(
    asked: Runtime | Auto,
    network: nn.Module,
    device: torch.device,
    precision: Precision,
    num_pixels: int,
) -> Runtime:
    """Return the runtime of a frozen network.

    ``auto`` follows from network, device and images alone, not from a clock: another choice on a busy day
    would change the last bits of the features, and of all that is trained on them.

    Args:
        asked: as in the recipe.
        network: the whole network.
        device: its device.
        precision: precision of the forward pass.
        num_pixels: pixels of all views that have features.

    Raises:
        UsageError: onnxruntime is asked for on a GPU or in another precision than float32.
    """
    is_possible = device.type == "cpu" and precision == "float32"
    if asked == "onnxruntime" and not is_possible:
        found = f"it runs on a CPU in float32 only, and this is {device.type} in {precision}"
        raise UsageError("runtime=onnxruntime", found, "Drop the key.")
    if asked != "auto":
        return asked
    pays = num_pixels >= LEAST_PIXELS and is_convolutional(network)
    return "onnxruntime" if is_possible and pays else "torch"


def describe_runtime(runtime: Runtime) -> str:
    """Return name and version of a runtime, as far as features depend on it beside torch's version."""
    return f"onnxruntime {onnxruntime.__version__}" if runtime == "onnxruntime" else "torch"


def open_forward(
    runtime: Runtime,
    network: nn.Module,
    forward: Forward,
    placement: Placement,
    input_size: tuple[int, int, int],
    display: Display,
) -> Forward:
    """Return a function that computes what ``forward`` does, by a runtime.

    A network that cannot be exported, or whose graph gives other rows, runs in torch. That follows from the
    network and the versions, so that the same run always does the same.

    Args:
        runtime: result of :func:`choose_runtime`.
        network: the network that ``forward`` runs, in eval mode.
        forward: takes images (B, C, H, W) and returns rows (B, D).
        placement: device and memory layout of the images.
        input_size: (C, H, W) of the images.
        display: shows what was chosen.
    """
    if runtime == "torch":
        return forward
    started = time.perf_counter()
    with display.busy("exporting the network to ONNX Runtime"), torch.no_grad():
        session, obstacle = _export(network, forward, placement, input_size)
    if session is None:
        display.say(f"the network runs in torch: {obstacle}")
        return forward
    display.say(f"the network runs in ONNX Runtime (exported in {time.perf_counter() - started:.1f} s)")
    return session


class _Session:
    """Rows of images (B, C, H, W) float32 from an exported graph."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        # Threads that wait actively would take the cores from the decoding processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        [rows] = self._session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(rows)


class _Rows(nn.Module):
    """A forward function as a module that owns the weights, as the exporter takes it."""

    def __init__(self, network: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.network, self._forward = network, forward

    def forward(self, images: Tensor) -> Tensor:
        return self._forward(images)


def _export(
    network: nn.Module, forward: Forward, placement: Placement, input_size: tuple[int, int, int]
) -> tuple[_Session | None, str]:
    """Return the exported forward, or why there is none."""
    if sum(weight.numel() * weight.element_size() for weight in network.parameters()) > LARGEST_BYTES:
        return None, "it is too large for one ONNX file"
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=placement.memory_format)
    buffer = io.BytesIO()
    try:
        with _silent():
            # The exporter by TorchScript: that by torch.export takes six times as long,
            # and does not take a forward that ends early.
            torch.onnx.export(
                _Rows(network, forward).eval(),
                (images,),
                buffer,  # type: ignore[arg-type]  # the older exporter takes one
                dynamo=False,
                opset_version=_OPSET,
                input_names=["images"],
                output_names=["rows"],
                dynamic_axes={"images": {0: "batch"}, "rows": {0: "batch"}},
            )
        session = _Session(buffer.getvalue())
        # Two sizes, since a graph may hold the batch size of its example.
        is_same = all(_agrees(session, forward, batch) for batch in (images, images[:1]))
    except Exception as error:  # of any class: the converters have no common one
        return None, f"ONNX Runtime cannot run it ({type(error).__name__}: {_first_words(error)})"
    return (session, "") if is_same else (None, "ONNX Runtime gives other features")


def _agrees(session: _Session, forward: Forward, images: Tensor) -> bool:
    rows = forward(images)
    share, share_of_largest = TOLERANCE
    largest = rows.abs().max().item()
    return torch.allclose(session(images), rows, rtol=share, atol=share_of_largest * largest)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the exporter: it warns that it is the older one, and its C++ part prints a graph that fails."""
    with ExitStack() as undo:
        nothing = undo.enter_context(Path(os.devnull).open("wb"))
        with suppress(OSError):  # of a process without stdout
            stdout = os.dup(1)
            undo.callback(os.close, stdout)
            undo.callback(os.dup2, stdout, 1)
            os.dup2(nothing.fileno(), 1)
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
