"""The inputs of a bundle's graph (docs/how-it-works.md) and what is computed from them alone."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from chai_export.graph.match.site import AttentionSite, with_cache
from chai_export.graph.read.builder import Builder, graph_input

POSITIONS_NAME = "token_positions"
"""Value int64 [B, S] of a bundle's graph: the position id of each token."""


@dataclass(frozen=True)
class Interface:
    """Input values of the rewritten graph.

    input_ids int64 [B,S], lengths and past_lengths int32 [B], output_positions int64 [B,N], head_map int32
    [L,B,H]; past_keys T [B,R_i,C,D] and past_values T [B,G,C,Dv] by layer, of those that have a cache.
    """

    input_ids: ir.Value
    lengths: ir.Value
    past_lengths: ir.Value
    output_positions: ir.Value
    head_map: ir.Value
    past_keys: dict[int, ir.Value]
    past_values: dict[int, ir.Value]

    @property
    def inputs(self) -> list[ir.Value]:
        """All graph inputs, in order."""
        pairs = zip(self.past_keys.values(), self.past_values.values(), strict=True)
        caches = [value for pair in pairs for value in pair]
        return [
            self.input_ids,
            self.lengths,
            self.past_lengths,
            self.output_positions,
            self.head_map,
            *caches,
        ]


def make_interface(input_ids: ir.Value, sites: list[AttentionSite]) -> Interface:
    """Create the inputs; nothing is connected yet."""
    integer, small = ir.DataType.INT64, ir.DataType.INT32
    input_ids.shape = ir.Shape(["batch", "tokens"])
    lengths = graph_input("lengths", small, ["batch"])
    past_lengths = graph_input("past_lengths", small, ["batch"])
    heads = sites[0].heads.num_query_heads
    keys, values = {}, {}
    for site in with_cache(sites):
        dtype = site.key.past.dtype or ir.DataType.FLOAT
        key_dims: list[str | int] = ["batch", f"kept_heads_{site.layer}", "capacity", site.heads.head_dim]
        value_dims: list[str | int] = [
            "batch",
            site.heads.num_kv_heads,
            "capacity",
            site.heads.value_head_dim,
        ]
        keys[site.layer] = graph_input(f"past_key.{site.layer}", dtype, key_dims)
        values[site.layer] = graph_input(f"past_value.{site.layer}", dtype, value_dims)
    return Interface(
        input_ids=input_ids,
        lengths=lengths,
        past_lengths=past_lengths,
        output_positions=graph_input("output_positions", integer, ["batch", "outputs"]),
        head_map=graph_input("head_map", small, [len(sites), "batch", heads]),
        past_keys=keys,
        past_values=values,
    )


def token_positions(builder: Builder, interface: Interface) -> ir.Value:
    """Position ids int64 [B, S]: max(0, n + min(i, m-1)), see docs/how-it-works.md.

    A padded token has the position of the last valid one, so that position tables are never overrun.
    """
    one, zero = builder.integer(1), builder.integer(0)
    integer = ir.DataType.INT64.value
    tokens = builder.op(
        "Squeeze", builder.op("Shape", interface.input_ids, start=1, end=2), builder.integers(0)
    )
    steps = builder.op("Range", zero, tokens, one)
    columns = [
        builder.op("Unsqueeze", builder.op("Cast", value, to=integer), builder.integers(1))
        for value in (interface.lengths, interface.past_lengths)
    ]
    last = builder.op("Sub", columns[0], one)
    position = builder.op("Add", builder.op("Min", steps, last), columns[1])
    result = builder.op("Max", position, zero, name=POSITIONS_NAME)
    result.type, result.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["batch", "tokens"])
    return result
