"""Pieces of the function bodies in ONNX's text form: constants, rows, the probe, the head map, slots.

Names are values of the function: each piece reads what earlier ones made. Two things are deliberate:

* K and V are masked with ``Where`` before the products (0 * NaN is NaN); scores get a finite -1e30.
* The head map is int64 arithmetic, the choice of KV heads a ``Loop`` of no steps where none is needed.
  ``stamp`` is the step in which a KV head was last chosen: those of the last R steps are kept.
"""

from __future__ import annotations

from chai_export.op.head_map import QUANTISATION_STEPS, UNASSIGNED_DISTANCE

CONSTANTS = """
  attr_scale = Constant <value_float: float = @scale> ()
  attr_probe = Constant <value_int: int = @probe_tokens> ()
  attr_online = Constant <value_int: int = @online> ()
  attr_group = Constant <value_int: int = @group> ()
  attr_window = Constant <value_int: int = @window> ()
  attr_softcap = Constant <value_float: float = @softcap> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  two = Constant <value_int: int = 2> ()
  axis0 = Constant <value_ints: ints = [0]> ()
  axis1 = Constant <value_ints: ints = [1]> ()
  axis2 = Constant <value_ints: ints = [2]> ()
  axis3 = Constant <value_ints: ints = [3]> ()
  axis4 = Constant <value_ints: ints = [4]> ()
  axes_1_2 = Constant <value_ints: ints = [1, 2]> ()
  axes_1_3 = Constant <value_ints: ints = [1, 3]> ()
  axes_2_3 = Constant <value_ints: ints = [2, 3]> ()
  axes_1_2_3 = Constant <value_ints: ints = [1, 2, 3]> ()
  minus1 = Constant <value_ints: ints = [-1]> ()
  keep1 = Constant <value_ints: ints = [0]> ()
  keep2 = Constant <value_ints: ints = [0, 0]> ()
  keep3 = Constant <value_ints: ints = [0, 0, 0]> ()
  group_1 = Unsqueeze (attr_group, axis0)
  zero_f = Constant <value_float: float = 0.0> ()
  one_f = Constant <value_float: float = 1.0> ()
  masked_score = Constant <value_float: float = -1.0e30> ()
"""

PAGE_SIZES = """
  N = Shape <start: int = 0, end: int = 1> (key_cache)
  L = Shape <start: int = 2, end: int = 3> (key_cache)
  M = Shape <start: int = 1, end: int = 2> (page_table)
  C = Mul (M, L)
  L_0 = Squeeze (L)
"""
"""Sizes of caches in pages."""

SIZES = """
  B = Shape <start: int = 0, end: int = 1> (query)
  H = Shape <start: int = 1, end: int = 2> (query)
  S = Shape <start: int = 2, end: int = 3> (query)
  D = Shape <start: int = 3, end: int = 4> (query)
  G = Shape <start: int = 1, end: int = 2> (key)
  Dv = Shape <start: int = 3, end: int = 4> (value)
  R = Shape <start: int = 1, end: int = 2> (key_cache)
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
"""Sizes and index vectors, for caches of C positions a row."""

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
  key_any = Cast <to: int = 1> (key)
  key_f = Where (valid_token_4, key_any, zero_f)
  value_any = Cast <to: int = 1> (value)
  value_f = Where (valid_token_4, value_any, zero_f)
  is_first = Equal (n, zero)
  is_active = Greater (m, zero)
  is_online = Equal (attr_online, one)
  first_active = And (is_first, is_active)
  fresh = And (first_active, is_online)
  fresh_i = Cast <to: int = 7> (fresh)
  any_fresh = ReduceMax <keepdims: int = 0> (fresh_i)
  fresh_col = Unsqueeze (fresh, axis1)
  past_map = Cast <to: int = 7> (past_head_map)
  probe_0 = Min (attr_probe, S_0)
  probe = Unsqueeze (probe_0, axis0)
  probe_token = Range (zero, probe_0, one)
"""
"""Which tokens of each row are valid, which rows are fresh."""

_MAP_DISTANCES = f"""
  steps = Constant <value_float: float = {float(QUANTISATION_STEPS)}> ()
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
"""

_STEPS = """
  steps_in_all = Mul (R_0, two)
  stamp_shape = Concat <axis: int = 0> (B, G)
  never = Neg (R_0)
"""

STEPS_IF_FRESH = (
    _STEPS
    + """
  steps_now = Mul (steps_in_all, any_fresh)
  stamp_start = Expand (never, stamp_shape)
"""
)
"""KV heads are chosen where a row is fresh."""


def steps_by_shape(*, sinks: bool) -> str:
    """KV heads are chosen where there is more than one token, whatever stands in the rows.

    All of one token's probabilities are 1, if no sink takes a part, so all distances are 0 and the choice is
    the first R.
    """
    if sinks:
        return (
            _STEPS
            + """
  steps_now = Identity (steps_in_all)
  stamp_start = Expand (never, stamp_shape)
"""
        )
    return (
        _STEPS
        + """
  further_tokens = Sub (S_0, one)
  is_longer = Min (further_tokens, one)
  steps_now = Mul (steps_in_all, is_longer)
  is_alone = Equal (S_0, one)
  is_low = Less (kv, R_0)
  is_preset = And (is_low, is_alone)
  stamp_of_kv = Where (is_preset, R_0, never)
  stamp_start = Expand (stamp_of_kv, stamp_shape)
"""
    )


_CHOICE = f"""
  far = Constant <value_int: int = {UNASSIGNED_DISTANCE}> ()
  grouped_shape = Concat <axis: int = 0> (B, H, G, group)
  dist_grouped = Reshape (dist, grouped_shape)
  dist_kv = ReduceMin <keepdims: int = 0> (dist_grouped, axis3)
  always = Constant <value = bool {{1}}> ()
  stamp_end = Loop (steps_now, always, stamp_start) <
    body = choose (int64 step, bool go_on, int64[batch, kv_heads] stamp)
        => (bool go_on_out, int64[batch, kv_heads] stamp_out) {{
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
    }}
  >
  kept_end = GreaterOrEqual (stamp_end, R_0)
  chosen_kv = Cast <to: int = 7> (kept_end)
"""

_ASSIGNMENT = """
  kept_of_head_i = Gather <axis: int = 1> (KEPT, kv_of_head)
  kept_of_head = Cast <to: int = 9> (kept_of_head_i)
  candidate = Unsqueeze (kept_of_head, axis1)
  reachable = Where (candidate, dist, out_of_reach)
  nearest_distance = ReduceMin <keepdims: int = 1> (reachable, axis2)
  is_nearest = Equal (reachable, nearest_distance)
  head_or_H = Where (is_nearest, head, H_0)
  nearest_head = ReduceMin <keepdims: int = 0> (head_or_H, axis2)
  online_map = Where (kept_of_head, head, nearest_head)
  chosen_map = Where (fresh_col, online_map, past_map)
  present_head_map = Cast <to: int = 6> (chosen_map)
  map_low = Max (chosen_map, zero)
  map = Min (map_low, last_head)
"""


def chosen_map(steps: str) -> str:
    """The head map of fresh rows with KV heads chosen among all: as an output, and in bounds as an index."""
    return _MAP_DISTANCES + steps + _CHOICE + _ASSIGNMENT.replace("KEPT", "chosen_kv")


GIVEN_MAP = _MAP_DISTANCES + _ASSIGNMENT.replace("KEPT", "kept_kv")
"""The head map of fresh rows with the KV heads that ``slots`` found."""

KEPT_MAP = """
  kept_map_any = Cast <to: int = 7> (kept_head_map)
  kept_map_low = Max (kept_map_any, zero)
  kept_map = Min (kept_map_low, last_head)
"""
"""The producer's map, in bounds."""


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
  slot_kv_ids = Unsqueeze (slot_kv, axis2)
  slot_used_i = ReduceMax <keepdims: int = 0> (slot_is_kv_i, axis2)
  slot_used = Cast <to: int = 9> (slot_used_i)
  slot_used_4 = Unsqueeze (slot_used, axes_2_3)
  last_slot = Sub (R_0, one)
"""
