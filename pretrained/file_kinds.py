"""Say what a file is that holds no weights that can be read, such as a page or a file of Keras."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

_MAGIC = {
    b"version https://git-lfs": (
        "a pointer of git-lfs, not the weights",
        "Fetch the weights with git lfs pull.",
    ),
    b"<": ("a web page or XML, not the weights", "Download the file itself."),
    b"{": ("JSON, not the weights", "Name the file with the weights."),
    b"\x89HDF": ("an HDF5 file, as Keras writes it", "Give a state dict of PyTorch or safetensors."),
    b"\x1f\x8b": ("packed with gzip", "Unpack it first."),
}
_UNPACK = "Unpack it, and name the file with the weights."
_TAR_MAGIC = (257, b"ustar")
_HEAD_BYTES = 512


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do, whatever its name is: a length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def describe_foreign(path: Path) -> tuple[str, str] | None:
    """Return what a file is that PyTorch cannot read, and what to do; None if it may be damaged weights."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head[4:8] == bytes(4) and head[8:9] in (b"{", b"["):
        return None  # safetensors: the length of a header may begin like any file
    offset, tar = _TAR_MAGIC
    if head[offset : offset + len(tar)] == tar:
        return "a tar archive", _UNPACK
    if is_zipfile(path):
        return _describe_zip(path)
    if path.suffix == ".onnx":
        return "an ONNX file", "Give a state dict of PyTorch or safetensors."
    return next((what for magic, what in _MAGIC.items() if head.lstrip().startswith(magic)), None)


def _describe_zip(path: Path) -> tuple[str, str] | None:
    try:
        with ZipFile(path) as archive:
            names = archive.namelist()
    except BadZipFile:
        return None
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy", "Save the arrays as safetensors (safetensors.numpy.save_file)."
    if any(name.endswith(".h5") for name in names):
        return "a file of Keras", "Give a state dict of PyTorch or safetensors."
    return "a zip archive, not a file of torch.save", _UNPACK
