"""Pieces of the function bodies in ONNX's text form: scores, softmax and output.

Scores are computed for the query heads of kept KV heads only, then shared by index: probabilities where heads
that share scores share them too, scores where each has a sink or slope of its own.
"""

from __future__ import annotations


def softcapped(scores: str, result: str, softcap: bool) -> str:
    """``result``: scores under the soft cap."""
    if not softcap:
        return f"  {result} = Identity ({scores})\n"
    return f"""
  {result}_ratio = Div ({scores}, attr_softcap)
  {result}_tanh = Tanh ({result}_ratio)
  {result} = Mul ({result}_tanh, attr_softcap)
"""


def softmax(scores: str, mask: str, result: str, *, sinks: bool, distance: str | None) -> str:
    """``result``: probabilities of ``scores`` [B,H,…,keys] where ``mask``.

    ``distance`` names float32 key position - query position [B or 1,1,…,keys], if there are slopes.
    """
    text = ""
    if distance is not None:
        text += f"""
  {result}_slope = Unsqueeze (alibi_slopes, axes_1_2)
  {result}_bias = Mul ({result}_slope, {distance})
  {result}_biased = Add ({scores}, {result}_bias)
"""
        scores = f"{result}_biased"
    text += f"  {result}_masked = Where ({mask}, {scores}, masked_score)\n"
    if not sinks:
        return text + f"  {result} = Softmax <axis: int = -1> ({result}_masked)\n"
    return (
        text
        + f"""
  {result}_keys = Shape <start: int = 3, end: int = 4> ({scores})
  {result}_lead = Shape <start: int = 0, end: int = 3> ({scores})
  {result}_one = Unsqueeze (one, axis0)
  {result}_sink_shape = Concat <axis: int = 0> ({result}_lead, {result}_one)
  {result}_sink_f = Cast <to: int = 1> (sinks)
  {result}_sink_3 = Unsqueeze ({result}_sink_f, axes_1_2)
  {result}_sink = Expand ({result}_sink_3, {result}_sink_shape)
  {result}_with_sink = Concat <axis: int = 3> ({result}_masked, {result}_sink)
  {result}_all = Softmax <axis: int = -1> ({result}_with_sink)
  {result} = Slice ({result}_all, axis0, {result}_keys, axis3)
"""
    )


def probe(*, sinks: bool, slopes: bool, softcap: bool) -> str:
    """``probe_p``: exact probabilities of the first min(P, S) tokens of each row, of use in fresh ones."""
    return (
        """
  probe_query = Slice (query_f, axis0, probe, axis2)
  probe_key_kv = Slice (key_f, axis0, probe, axis2)
  probe_key = Gather <axis: int = 1> (probe_key_kv, kv_of_head)
  probe_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (probe_key)
  probe_product = MatMul (probe_query, probe_key_t)
  probe_scaled = Mul (probe_product, score_scale)
  probe_row = Unsqueeze (probe_token, axis1)
  probe_causal = LessOrEqual (probe_token, probe_row)
  probe_distance_i = Sub (probe_token, probe_row)
  probe_distance = Cast <to: int = 1> (probe_distance_i)
  probe_window = Neg (window_any)
  probe_near = Greater (probe_distance_i, probe_window)
  probe_visible = And (probe_causal, probe_near)
"""
        + softcapped("probe_scaled", "probe_scores", softcap)
        + softmax(
            "probe_scores",
            "probe_visible",
            "probe_p",
            sinks=sinks,
            distance="probe_distance" if slopes else None,
        )
    )


def attend(*, sinks: bool, slopes: bool, softcap: bool) -> str:
    """``output``: representatives' scores shared, the probe's tokens of fresh rows exact.

    A map entry whose KV head has no slot gives a rank of -1 or past the last slot, an index within the bounds
    of ``GatherND`` either way.
    """
    text = _SCORES + softcapped("kept_scaled_heads", "kept_scores", softcap) + _SHARES
    if sinks or slopes:
        distance = "distance" if slopes else None
        text += "  shared_scores = GatherND <batch_dims: int = 1> (kept_scores, row_of_head_3)\n"
        text += softmax("shared_scores", "visible_4", "p_of_head", sinks=sinks, distance=distance)
    else:
        text += softmax("kept_scores", "visible_4", "kept_p", sinks=False, distance=None)
        text += "  p_of_head = GatherND <batch_dims: int = 1> (kept_p, row_of_head_3)\n"
    return text + _OUTPUT


_SCORES = """
  by_kv_shape = Concat <axis: int = 0> (B, G, group, S, D)
  query_by_kv = Reshape (query_f, by_kv_shape)
  kept_query = GatherND <batch_dims: int = 1> (query_by_kv, slot_kv_ids)
  kept_rows_shape = Concat <axis: int = 0> (B, R, minus1, D)
  kept_query_rows = Reshape (kept_query, kept_rows_shape)
  cached_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (cached_key)
  kept_product = MatMul (kept_query_rows, cached_key_t)
  kept_scaled = Mul (kept_product, score_scale)
  kept_heads = Mul (R, group)
  kept_scores_shape = Concat <axis: int = 0> (B, kept_heads, S, C)
  kept_scaled_heads = Reshape (kept_scaled, kept_scores_shape)
  query_position = Add (token, n_col)
  query_position_3 = Unsqueeze (query_position, axis2)
  distance_i = Sub (position, query_position_3)
  causal = LessOrEqual (distance_i, zero)
  window_back = Neg (window_any)
  near = Greater (distance_i, window_back)
  visible = And (causal, near)
  visible_4 = Unsqueeze (visible, axis1)
  distance_f = Cast <to: int = 1> (distance_i)
  distance = Unsqueeze (distance_f, axis1)
"""

_SHARES = """
  rank_of_map = GatherElements <axis: int = 1> (rank, map_kv)
  slot_of_map = Min (rank_of_map, last_slot)
  map_first = Mul (map_kv, group_0)
  map_in_group = Sub (map, map_first)
  slot_first = Mul (slot_of_map, group_0)
  row_of_head = Add (slot_first, map_in_group)
  row_of_head_3 = Unsqueeze (row_of_head, axis2)
"""

_OUTPUT = """
  p_rows_shape = Concat <axis: int = 0> (B, G, minus1, C)
  p_rows = Reshape (p_of_head, p_rows_shape)
  shared_rows = MatMul (p_rows, cached_value)
  heads_shape = Concat <axis: int = 0> (B, H, S, Dv)
  shared = Reshape (shared_rows, heads_shape)
  shared_start = Slice (shared, axis0, probe, axis2)
  shared_rest = Slice (shared, probe, S, axis2)
  fresh_4 = Unsqueeze (fresh, axes_1_2_3)
  probe_value_kv = Slice (value_f, axis0, probe, axis2)
  probe_value = Gather <axis: int = 1> (probe_value_kv, kv_of_head)
  probe_output = MatMul (probe_p, probe_value)
  start = Where (fresh_4, probe_output, shared_start)
  attended = Concat <axis: int = 2> (start, shared_rest)
  attended_valid = Where (valid_token_4, attended, zero_f)
  by_token = Transpose <perm: ints = [0, 2, 1, 3]> (attended_valid)
  width = Mul (H, Dv)
  output_shape = Concat <axis: int = 0> (B, S, width)
  output_f = Reshape (by_token, output_shape)
  output = CastLike (output_f, query)
"""
