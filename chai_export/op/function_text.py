"""The pieces that the ops' function bodies are made of, in ONNX's text form.

Names are values of the function: each piece reads what earlier ones made. Four things are deliberate:

* K and V are masked with ``Where`` before the products (0 * NaN is NaN); scores get a finite -1e30.
* Caches are written with ``Where`` over every position: ``TensorScatter`` would write padding.
* The head map is int64 arithmetic, the choice of KV heads a ``Loop``; both stand in an ``If`` that decode
  skips. ``stamp`` is the step in which a KV head was last chosen: those of the last R steps are kept.
* Scores are computed for the query heads of kept KV heads only, then shared by index.
"""

from __future__ import annotations

from chai_export.op.head_map import UNASSIGNED_DISTANCE

CONSTANTS = """
  attr_scale = Constant <value_float: float = @scale> ()
  attr_probe = Constant <value_int: int = @probe_tokens> ()
  attr_online = Constant <value_int: int = @online> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  axis0 = Constant <value_ints: ints = [0]> ()
  axis1 = Constant <value_ints: ints = [1]> ()
  axis2 = Constant <value_ints: ints = [2]> ()
  axis3 = Constant <value_ints: ints = [3]> ()
  axes_1_3 = Constant <value_ints: ints = [1, 3]> ()
  axes_2_3 = Constant <value_ints: ints = [2, 3]> ()
  axes_1_2_3 = Constant <value_ints: ints = [1, 2, 3]> ()
  minus1 = Constant <value_ints: ints = [-1]> ()
  zero_f = Constant <value_float: float = 0.0> ()
  one_f = Constant <value_float: float = 1.0> ()
  masked_score = Constant <value_float: float = -1.0e30> ()
"""


def sizes(value: str, key_cache: str) -> str:
    """Sizes and index vectors; ``value`` names an input [B,G,…,Dv] and ``key_cache`` one [B,R,C,D]."""
    return f"""
  B = Shape <start: int = 0, end: int = 1> (query)
  H = Shape <start: int = 1, end: int = 2> (query)
  S = Shape <start: int = 2, end: int = 3> (query)
  D = Shape <start: int = 3, end: int = 4> (query)
  G = Shape <start: int = 1, end: int = 2> (key)
  Dv = Shape <start: int = 3, end: int = 4> ({value})
  R = Shape <start: int = 1, end: int = 2> ({key_cache})
  C = Shape <start: int = 2, end: int = 3> ({key_cache})
  H_0 = Squeeze (H)
  S_0 = Squeeze (S)
  G_0 = Squeeze (G)
  R_0 = Squeeze (R)
  C_0 = Squeeze (C)
  group_0 = Div (H_0, G_0)
  group = Div (H, G)
  last_head = Sub (H_0, one)
  head = Range (zero, H_0, one)
  token = Range (zero, S_0, one)
  kv = Range (zero, G_0, one)
  slot = Range (zero, R_0, one)
  position = Range (zero, C_0, one)
  kv_of_head = Div (head, group_0)
  D_f = Cast <to: int = 1> (D)
  sqrt_D = Sqrt (D_f)
  default_scale = Div (one_f, sqrt_D)
  scale_is_zero = Equal (attr_scale, zero_f)
  score_scale = Where (scale_is_zero, default_scale, attr_scale)
"""


ROWS = """
  n = Cast <to: int = 7> (past_lengths)
  m = Cast <to: int = 7> (lengths)
  n_col = Unsqueeze (n, axis1)
  m_col = Unsqueeze (m, axis1)
  total_col = Add (n_col, m_col)
  valid_token = Less (token, m_col)
  valid_token_4 = Unsqueeze (valid_token, axes_1_3)
  query_any = Cast <to: int = 1> (query)
  query_f = Where (valid_token_4, query_any, zero_f)
  is_first = Equal (n, zero)
  is_active = Greater (m, zero)
  is_online = Equal (attr_online, one)
  first_active = And (is_first, is_active)
  fresh = And (first_active, is_online)
  fresh_i = Cast <to: int = 7> (fresh)
  any_fresh_i = ReduceMax <keepdims: int = 0> (fresh_i)
  any_fresh = Cast <to: int = 9> (any_fresh_i)
  fresh_col = Unsqueeze (fresh, axis1)
  past_map = Cast <to: int = 7> (past_head_map)
  probe_0 = Min (attr_probe, S_0)
  probe = Unsqueeze (probe_0, axis0)
  probe_token = Range (zero, probe_0, one)
  in_total = Less (position, total_col)
  in_total_4 = Unsqueeze (in_total, axes_1_3)
"""
"""Which tokens and cache positions of each row are valid, which rows are fresh."""

PROBE = """
  read_key = And (valid_token, fresh_col)
  read_key_4 = Unsqueeze (read_key, axes_1_3)
  key_any = Cast <to: int = 1> (key)
  key_f = Where (read_key_4, key_any, zero_f)
  probe_query = Slice (query_f, axis0, probe, axis2)
  probe_key_kv = Slice (key_f, axis0, probe, axis2)
  probe_key = Gather <axis: int = 1> (probe_key_kv, kv_of_head)
  probe_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (probe_key)
  probe_product = MatMul (probe_query, probe_key_t)
  probe_scaled = Mul (probe_product, score_scale)
  probe_row = Unsqueeze (probe_token, axis1)
  probe_causal = LessOrEqual (probe_token, probe_row)
  probe_scores = Where (probe_causal, probe_scaled, masked_score)
  probe_p = Softmax <axis: int = -1> (probe_scores)
"""
"""Exact probabilities of the first min(P, S) tokens of fresh rows, whose keys are read from ``key``."""

_CHOICE = """      far = Constant <value_int: int = FAR> ()
      grouped_shape = Concat <axis: int = 0> (B, H, G, group)
      dist_grouped = Reshape (dist, grouped_shape)
      dist_kv = ReduceMin <keepdims: int = 0> (dist_grouped, axis3)
      two = Constant <value_int: int = 2> ()
      steps_in_all = Mul (R_0, two)
      stamp_shape = Concat <axis: int = 0> (B, G)
      never = Neg (R_0)
      stamp_start = Expand (never, stamp_shape)
      always = Constant <value = bool {1}> ()
      stamp_end = Loop (steps_in_all, always, stamp_start) <
        body = choose (int64 step, bool go_on, int64[batch, kv_heads] stamp)
            => (bool go_on_out, int64[batch, kv_heads] stamp_out) {
          oldest = Sub (step, R_0)
          is_kept = Greater (stamp, oldest)
          is_kept_3 = Unsqueeze (is_kept, axis1)
          reached = Where (is_kept_3, dist_kv, far)
          nearest = ReduceMin <keepdims: int = 1> (reached, axis2)
          joined = Min (nearest, dist_kv)
          cost_any = ReduceSum <keepdims: int = 0> (joined, axis1)
          cost = Where (is_kept, out_of_reach, cost_any)
          least = ReduceMin <keepdims: int = 1> (cost, axis1)
          is_least = Equal (cost, least)
          index_or_G = Where (is_least, kv, G_0)
          best = ReduceMin <keepdims: int = 1> (index_or_G, axis1)
          is_best = Equal (kv, best)
          stamp_out = Where (is_best, step, stamp)
          go_on_out = Identity (go_on)
        }
      >
      kept_end = GreaterOrEqual (stamp_end, R_0)
      kept_i = Cast <to: int = 7> (kept_end)
""".replace("FAR", str(UNASSIGNED_DISTANCE))

_HEAD_MAP = """
  chosen_map = If (any_fresh) <
    then_branch = clustered () => (int64[batch, heads] clustered_map) {
      steps = Constant <value_float: float = 1024.0> ()
      out_of_reach = Constant <value_int: int = 4611686018427387904> ()
      p_steps = Mul (probe_p, steps)
      p_rounded = Round (p_steps)
      probe_valid = Less (probe_token, m_col)
      probe_valid_4 = Unsqueeze (probe_valid, axes_1_3)
      p_valid = Where (probe_valid_4, p_rounded, zero_f)
      u_4 = Cast <to: int = 7> (p_valid)
      flat_shape = Concat <axis: int = 0> (B, H, minus1)
      u = Reshape (u_4, flat_shape)
      u_a = Unsqueeze (u, axis2)
      u_b = Unsqueeze (u, axis1)
      difference = Sub (u_a, u_b)
      absolute = Abs (difference)
      dist = ReduceSum <keepdims: int = 0> (absolute, axis3)
CHOICE      kept_of_head_i = Gather <axis: int = 1> (KEPT, kv_of_head)
      kept_of_head = Cast <to: int = 9> (kept_of_head_i)
      candidate = Unsqueeze (kept_of_head, axis1)
      reachable = Where (candidate, dist, out_of_reach)
      nearest_distance = ReduceMin <keepdims: int = 1> (reachable, axis2)
      is_nearest = Equal (reachable, nearest_distance)
      head_or_H = Where (is_nearest, head, H_0)
      nearest_head = ReduceMin <keepdims: int = 0> (head_or_H, axis2)
      online_map = Where (kept_of_head, head, nearest_head)
      clustered_map = Where (fresh_col, online_map, past_map)
    },
    else_branch = unchanged () => (int64[batch, heads] same_map) {
      same_map = Identity (past_map)
    }
  >
"""

MAP = """
  present_head_map = Cast <to: int = 6> (chosen_map)
  map_low = Max (chosen_map, zero)
  map = Min (map_low, last_head)
"""
"""The map as an output, and inside its bounds as an index."""

CHOSEN_MAP = _HEAD_MAP.replace("CHOICE", _CHOICE).replace("KEPT", "kept_i")
"""The head map of fresh rows with KV heads chosen among all."""

GIVEN_MAP = _HEAD_MAP.replace("CHOICE", "").replace("KEPT", "kept_kv")
"""The head map of fresh rows with the KV heads that ``slots`` found."""


def slots(head_map: str) -> str:
    """Slot s of a row holds the s-th KV head that ``head_map`` keeps, in ascending order."""
    return _SLOTS.replace("MAP", head_map)


_SLOTS = """
  MAP_kv = Div (MAP, group_0)
  MAP_kv_3 = Unsqueeze (MAP_kv, axis2)
  uses = Equal (MAP_kv_3, kv)
  uses_i = Cast <to: int = 7> (uses)
  kept_kv = ReduceMax <keepdims: int = 0> (uses_i, axis1)
  rank_end = CumSum (kept_kv, one)
  rank = Sub (rank_end, one)
  slot_col = Unsqueeze (slot, axis1)
  rank_3 = Unsqueeze (rank, axis1)
  rank_matches = Equal (rank_3, slot_col)
  kept_b = Cast <to: int = 9> (kept_kv)
  kept_3 = Unsqueeze (kept_b, axis1)
  slot_is_kv = And (rank_matches, kept_3)
  slot_is_kv_i = Cast <to: int = 7> (slot_is_kv)
  slot_weighted = Mul (slot_is_kv_i, kv)
  slot_kv = ReduceSum <keepdims: int = 0> (slot_weighted, axis2)
  slot_used_i = ReduceMax <keepdims: int = 0> (slot_is_kv_i, axis2)
  slot_used = Cast <to: int = 9> (slot_used_i)
  slot_used_4 = Unsqueeze (slot_used, axes_2_3)
  last_slot = Sub (R_0, one)
"""

APPEND = """
  axes_0_2_3 = Constant <value_ints: ints = [0, 2, 3]> ()
  size_one = Constant <value_ints: ints = [1]> ()
  from_n = Sub (position, n_col)
  last_token = Sub (S_0, one)
  from_n_low = Max (from_n, zero)
  source_token = Min (from_n_low, last_token)
  not_past = GreaterOrEqual (position, n_col)
  is_new = And (not_past, in_total)
  is_new_4 = Unsqueeze (is_new, axes_1_3)
  token_index = Unsqueeze (source_token, axes_1_3)
  B_0 = Squeeze (B)
  row = Range (zero, B_0, one)
  row_index = Unsqueeze (row, axes_1_2_3)
  key_index_shape = Concat <axis: int = 0> (B, R, C, size_one)
  value_index_shape = Concat <axis: int = 0> (B, G, C, size_one)
  slot_kv_index = Unsqueeze (slot_kv, axes_2_3)
  kv_index = Unsqueeze (kv, axes_0_2_3)
  key_rows = Expand (row_index, key_index_shape)
  key_kvs = Expand (slot_kv_index, key_index_shape)
  key_tokens = Expand (token_index, key_index_shape)
  key_source = Concat <axis: int = -1> (key_rows, key_kvs, key_tokens)
  value_rows = Expand (row_index, value_index_shape)
  value_kvs = Expand (kv_index, value_index_shape)
  value_tokens = Expand (token_index, value_index_shape)
  value_source = Concat <axis: int = -1> (value_rows, value_kvs, value_tokens)
  key_candidate = GatherND (key, key_source)
  value_candidate = GatherND (value, value_source)
  key_written = And (is_new_4, slot_used_4)
  present_key = Where (key_written, key_candidate, past_key)
  present_value = Where (is_new_4, value_candidate, past_value)
"""
"""The new rows written into both caches."""


def cached(key_cache: str, value_cache: str) -> str:
    """K and V in float32, zero where the caches are undefined."""
    return f"""
  key_defined = And (in_total_4, slot_used_4)
  cached_key_any = Cast <to: int = 1> ({key_cache})
  cached_value_any = Cast <to: int = 1> ({value_cache})
  cached_key = Where (key_defined, cached_key_any, zero_f)
  cached_value = Where (in_total_4, cached_value_any, zero_f)
"""


ATTEND = """
  by_kv_shape = Concat <axis: int = 0> (B, G, group, S, D)
  query_by_kv = Reshape (query_f, by_kv_shape)
  slot_kv_ids = Unsqueeze (slot_kv, axis2)
  kept_query = GatherND <batch_dims: int = 1> (query_by_kv, slot_kv_ids)
  kept_rows_shape = Concat <axis: int = 0> (B, R, minus1, D)
  kept_query_rows = Reshape (kept_query, kept_rows_shape)
  cached_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (cached_key)
  kept_product = MatMul (kept_query_rows, cached_key_t)
  kept_scaled = Mul (kept_product, score_scale)
  kept_heads = Mul (R, group)
  kept_scores_shape = Concat <axis: int = 0> (B, kept_heads, S, C)
  kept_scores_any = Reshape (kept_scaled, kept_scores_shape)
  query_position = Add (token, n_col)
  query_position_3 = Unsqueeze (query_position, axis2)
  causal = LessOrEqual (position, query_position_3)
  causal_4 = Unsqueeze (causal, axis1)
  kept_scores = Where (causal_4, kept_scores_any, masked_score)
  kept_p = Softmax <axis: int = -1> (kept_scores)
  rank_of_map = GatherElements <axis: int = 1> (rank, map_kv)
  slot_of_map = Min (rank_of_map, last_slot)
  map_first = Mul (map_kv, group_0)
  map_in_group = Sub (map, map_first)
  slot_first = Mul (slot_of_map, group_0)
  row_of_head = Add (slot_first, map_in_group)
  row_of_head_3 = Unsqueeze (row_of_head, axis2)
  p_of_head = GatherND <batch_dims: int = 1> (kept_p, row_of_head_3)
  p_rows_shape = Concat <axis: int = 0> (B, G, minus1, C)
  p_rows = Reshape (p_of_head, p_rows_shape)
  shared_rows = MatMul (p_rows, cached_value)
  heads_shape = Concat <axis: int = 0> (B, H, S, Dv)
  shared = Reshape (shared_rows, heads_shape)
  shared_start = Slice (shared, axis0, probe, axis2)
  shared_rest = Slice (shared, probe, S, axis2)
  fresh_4 = Unsqueeze (fresh, axes_1_2_3)
  last_position = Sub (C_0, one)
  probe_position = Min (probe_token, last_position)
  probe_value_kv = Gather <axis: int = 2> (cached_value, probe_position)
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
"""The output: representatives' scores shared, the probe's tokens of fresh rows exact.

A map entry whose KV head has no slot gives a rank of -1 or past the last slot, an index within the bounds of
``GatherND`` either way.
"""
