"""What a bundle stores for a token, beside the figures of a benchmark."""

from __future__ import annotations

from typing import Any

from chai_export.bundle.manifest import Manifest


def cache_facts(manifest: Manifest) -> dict[str, Any]:
    """Bytes of cache per token, as stored, with all heads, and with all heads in float16; bits by layer.

    Of ``key_bits`` and ``value_bits`` 0 is the bundle's dtype.
    """
    return {
        "op_version": manifest.op_version,
        "kv_bytes_per_token": manifest.kv_bytes_per_token("chai"),
        "kv_bytes_per_token_all_heads": manifest.kv_bytes_per_token("all"),
        "kv_bytes_per_token_float16": manifest.kv_bytes_per_token_float16,
        "key_bits": manifest.key_bits,
        "value_bits": manifest.value_bits,
    }


def is_quantised(manifest: Manifest) -> bool:
    """Whether keys or values of a layer are stored in 8 or 4 bits."""
    return manifest.storage.quantises
