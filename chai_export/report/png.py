"""A matrix as a small PNG for a ``data:`` address: one pixel a cell, without a plotting library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_LOW, _MIDDLE, _HIGH = (178, 89, 42), (247, 247, 244), (24, 78, 128)


def data_address(matrix: NDArray[np.floating]) -> str:
    """``data:image/png;base64,…`` of [rows, columns] from -1 (brown) through 0 (white) to 1 (blue)."""
    values = np.clip(np.nan_to_num(matrix.astype(np.float64)), -1.0, 1.0)[..., None]
    low, middle, high = (np.array(colour, dtype=np.float64) for colour in (_LOW, _MIDDLE, _HIGH))
    blend = np.where(values >= 0, middle + values * (high - middle), middle - values * (low - middle))
    return "data:image/png;base64," + base64.b64encode(encode(np.rint(blend).astype(np.uint8))).decode()


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """PNG file of an image, uint8 [height, width, 3]."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
