"""Keys that are stored in 4 bits are divided by their equaliser, and queries multiplied by it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from chai_export.bundle.manifest import Manifest
from chai_export.clustering import equaliser
from chai_export.clustering.plan import Chosen
from chai_export.errors import ChaiError
from chai_export.graph.match.site import AttentionSite
from chai_export.graph.read.builder import Builder
from chai_export.progress import note


def equalisers(clusters: Chosen, draft: Manifest) -> equaliser.Equalisers:
    """Those of the layers whose keys are stored in 4 bits.

    Raises:
        ChaiError: the peaks are of another model's sizes.
    """
    key_bits = draft.storage.key_bits
    if not clusters.key_peaks and 4 in key_bits:
        note(
            f"{clusters.origin} has no peaks of keys, so keys in 4 bits are stored as they are; calibrate "
            "again for a better cache"
        )
    found = equaliser.equalisers(clusters.key_peaks, key_bits)
    heads = draft.head_counts
    for layer, factors in found.items():
        if factors.shape != (heads.num_kv_heads, heads.head_dim):
            raise ChaiError(
                f"{clusters.origin}: key_peaks of layer {layer} are for {factors.shape[0]} KV heads of "
                f"{factors.shape[1]} channels, the model has {heads.num_kv_heads} of {heads.head_dim}; "
                "calibrate this model"
            )
    return found


def equalised(
    builder: Builder, site: AttentionSite, factors: NDArray[np.float32]
) -> tuple[ir.Value, ir.Value]:
    """Query and key of a site as the op is to see them: but for rounding, with the products that they had."""
    counts, dtype = site.heads, site.key.past.dtype or ir.DataType.FLOAT
    columns = factors[:, None, :]
    of_queries = np.repeat(columns, counts.num_query_heads // counts.num_kv_heads, axis=0)
    changed = []
    for op_type, what, value, by in (
        ("Mul", "query", site.query, of_queries),
        ("Div", "key", site.key.new, columns),
    ):
        constant = builder.constant(by.astype(dtype.numpy()), f"{what}_equaliser.{site.layer}")
        product = builder.op(op_type, value, constant, name=f"equalised_{what}.{site.layer}")
        product.type, product.shape = value.type, value.shape
        changed.append(product)
    return changed[0], changed[1]
