"""Sizes as people write them."""

from __future__ import annotations

import pytest

from chai_export.errors import UsageError
from chai_export.units import bytes_of, bytes_text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096), ("1B", 1), ("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 KiB", 1536),
        ("3kib", 3072), ("1tb", 10**12), (" 7 MiB ", 7 << 20), ("9007199254740993", 9007199254740993),
    ],
)  # fmt: skip
def test_sizes_are_read_with_decimal_and_binary_units(text, count):
    assert bytes_of(text, "--cache-memory") == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "2 GiBs", "-1", "1e9", "2G B", "½GiB", "٣GiB", "nan", "inf", "0", "0.1B"]
)
def test_what_is_no_size_is_refused_by_the_flag(text):
    with pytest.raises(UsageError, match="--cache-memory is "):
        bytes_of(text, "--cache-memory")


@pytest.mark.parametrize("count", [1536, 2 << 30, 5 << 40])
def test_what_is_printed_can_be_read(count):
    assert bytes_of(bytes_text(count), "--cache-memory") == count
