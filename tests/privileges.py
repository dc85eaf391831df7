"""Root, for whom the modes of files hold: as for any user of a folder that belongs to another."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_CALLS = {"x86_64": (125, 126), "aarch64": (90, 91)}
"""Numbers of capget and capset."""
_VERSION = 0x20080522


@contextmanager
def bound_by_modes() -> Iterator[None]:
    """Take root's capabilities from this thread, and those that it starts, while the block runs."""
    if os.geteuid() != 0:
        yield
        return
    if platform.machine() not in _CALLS:
        pytest.skip("the system calls of this machine are not known here")
    get, set_ = _CALLS[platform.machine()]
    call = ctypes.CDLL(None, use_errno=True).syscall
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of the lower and the upper 32
    assert call(get, header, before) == 0
    none = (ctypes.c_uint32 * 6)(*before)
    none[0] = none[3] = 0
    assert call(set_, header, none) == 0
    try:
        yield
    finally:
        assert call(set_, header, before) == 0
