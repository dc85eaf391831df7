"""The image formats that are read, those that are known and not read, and how either is recognised.

A photograph in a format that is not read counts as an image that cannot be read. It is listed with what to do
about it, and is neither ignored nor taken for a text file.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache

from PIL import _imaging

READ: dict[str, str] = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".pjpeg": "JPEG",
    ".pjp": "JPEG",
    ".png": "PNG",
    ".apng": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
    ".avif": "AVIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
}
"""Pillow's name of the format by file name suffix, in lower case."""

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "HEIF")
"""Formats whose parsers see the bytes of a file. Their number is small, which limits the attack surface (the
EPS parser starts Ghostscript). Phones' multi-picture JPEGs (MPO) come in through JPEG."""

HEIC = "HEIC"
_CONVERT = {
    HEIC: "a HEIC photograph: convert it to JPEG, or install pillow-heif (pip install pillow-heif)",
    "AVIF": "an AVIF photograph, which this Pillow cannot read: convert it to JPEG",
    "JPEG 2000": "a JPEG 2000 image, which is not read: convert it to PNG",
    "JPEG XL": "a JPEG XL image, which is not read: convert it to JPEG or PNG",
    "JPEG XR": "a JPEG XR image, which is not read: convert it to JPEG or PNG",
    "raw": "a camera's raw file, which is not read: convert it to JPEG (darktable-cli, dcraw)",
    "Photoshop": "a Photoshop file, which is not read: convert it to PNG",
    "DICOM": (
        "a DICOM image, which is not read: convert it to PNG "
        "(dcm2img, or pydicom's pixel_array with its window, and Pillow's Image.fromarray)"
    ),
    "NumPy": (
        "a NumPy array, which networks of RGB images do not take: convert it to PNG "
        "(Image.fromarray(numpy.load(file)).save(...), values as uint8 or uint16)"
    ),
    "FITS": "a FITS image, which is not read: convert it to PNG or TIFF",
    "slide": "a microscope's slide, which is not read: convert it to tiles, as PNG or JPEG",
    "NIfTI": "a NIfTI volume, which is not read: convert its slices to PNG",
    "high dynamic range": "an image of high dynamic range, which is not read: convert it to PNG",
    "other": "an image in a format that is not read: convert it to PNG or JPEG",
}
_UNREAD_SUFFIXES = {
    "JPEG 2000": ".jp2 .j2k .j2c .jpx .jpf",
    "JPEG XL": ".jxl",
    "JPEG XR": ".jxr .wdp .hdp",
    "raw": ".cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .dng .orf .raf .rw2 .pef .srw .x3f .3fr .iiq .erf .raw",
    "Photoshop": ".psd .psb",
    "DICOM": ".dcm .dicom",
    "FITS": ".fits .fit .fts",
    "slide": ".svs .ndpi .scn .mrxs .czi .lif .nd2 .vsi",
    "NIfTI": ".nii",
    "high dynamic range": ".exr .hdr",
    "other": ".tga .pcx .sgi .xcf .ras",
}
UNREAD: dict[str, str] = {
    suffix: kind for kind, suffixes in _UNREAD_SUFFIXES.items() for suffix in suffixes.split()
}
"""Kind of image by suffix, for formats that are known and not read."""

SUFFIXES: frozenset[str] = frozenset(READ) | frozenset(UNREAD)
"""Suffixes of images. A file with one of them is an image, whether or not it can be read."""

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
"""Suffixes of arrays of numbers (:mod:`finetune.data.channels.arrays`)."""

_BRANDS = {b"heic": HEIC, b"heix": HEIC, b"hevc": HEIC, b"heim": HEIC, b"heis": HEIC, b"mif1": HEIC}
_BRANDS |= {b"msf1": HEIC, b"avif": "AVIF", b"avis": "AVIF", b"crx ": "raw", b"jp2 ": "JPEG 2000"}
_MAGIC = {
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"II\xbc\x01": "JPEG XR",
    b"8BPS": "Photoshop",
    b"\x93NUMPY": "NumPy",
    b"SIMPLE  =": "FITS",
    b"v/1\x01": "high dynamic range",
    b"#?RADIANCE": "high dynamic range",
    b"FUJIFILMCCD-RAW": "raw",
    b"IIRO": "raw",
    b"IIU\0": "raw",
}
HEAD_BYTES = 132
"""Bytes from the start of a file by which its kind is recognised (DICOM has its name behind a preamble)."""


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def is_image_name(name: str) -> bool:
    """Return whether a file has the suffix of an image."""
    return suffix_of(name) in SUFFIXES


def is_array_name(name: str) -> bool:
    """Return whether a file has the suffix of an array of numbers."""
    return suffix_of(name) in ARRAY_SUFFIXES


def list_suffixes() -> str:
    """Return the suffixes of the formats that this installation reads, for messages."""
    return " ".join(sorted(suffix for suffix, form in READ.items() if form in readable_formats()))


def describe_unread(name: str, head: bytes) -> str | None:
    """Return what a file is and how to convert it, or None for a format that is not known.

    Args:
        name: name of the file.
        head: its first ``HEAD_BYTES`` bytes.
    """
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is None and head[4:8] == b"ftyp":
        kind = _BRANDS.get(head[8:12])
    if kind is None and head[128:132] == b"DICM":
        kind = "DICOM"
    # Text and zeros are no image, whatever the name says.
    if kind is None and head.strip(b"\0") and not _is_text(head[:16]):
        kind = UNREAD.get(suffix_of(name)) or (HEIC if READ.get(suffix_of(name)) == "HEIF" else None)
    return _CONVERT[kind] if kind else None


def _is_text(head: bytes) -> bool:
    return head.isascii() and all(letter >= 32 or letter in b"\t\r\n" for letter in head)


def describe_raw(name: str) -> str | None:
    """Return what to do about a camera's raw file: Pillow would read the small preview inside it."""
    return _CONVERT["raw"] if UNREAD.get(suffix_of(name)) in {"raw", "slide"} else None


def explain_suffix(suffix: str) -> str | None:
    """Return what a file with this suffix is and how to convert it, if it is an image or an array."""
    kind = "NumPy" if suffix in ARRAY_SUFFIXES else UNREAD.get(suffix)
    return _CONVERT[kind] if kind else None


@cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats of ``FORMATS`` that this installation reads: HEIC needs the package pillow-heif."""
    _silence_libtiff()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return tuple(form for form in FORMATS if form != "HEIF")
    register_heif_opener()
    return FORMATS


def _silence_libtiff() -> None:
    """Stop libtiff and Pillow's TIFF parser from writing to the standard error stream.

    Their lines name no file, and come from threads and other processes; the reason is in the error raised.
    """
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
    library = ctypes.CDLL(_imaging.__file__)  # also finds the functions of the libraries it depends on
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        function = getattr(library, name, None)
        if function is not None:
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)
