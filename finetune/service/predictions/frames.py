"""Frames between the server and the process of a model: a JSON header and some blocks of bytes.

::

    4 bytes: size of the header | header, JSON with "sizes" | the blocks, one after the other

Nothing but JSON and bytes passes, so that neither side can make the other run code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

_SIZE = struct.Struct(">I")
MOST_HEADER = 2**24


def write_frame(stream: BinaryIO, header: dict[str, Any], blocks: Sequence[bytes] = ()) -> None:
    """Write a frame and flush it.

    Raises:
        OSError: the other side is gone.
    """
    text = json.dumps(header | {"sizes": [len(block) for block in blocks]}).encode()
    stream.write(_SIZE.pack(len(text)))
    stream.write(text)
    for block in blocks:
        stream.write(block)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """Return the next frame.

    Raises:
        EOFError: the other side is gone, or has sent something else.
    """
    (size,) = _SIZE.unpack(_read(stream, _SIZE.size))
    if size > MOST_HEADER:
        raise EOFError("a header is too large")
    header: dict[str, Any] = json.loads(_read(stream, size))
    return header, [_read(stream, number) for number in header.pop("sizes")]


def _read(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the other side is gone")
    return content
