"""Pieces of the function bodies in ONNX's text form: pages, what is appended, and what is read.

The pools are written with one ``Where`` over every position: a small tensor of integers says which new token,
if any, owns each of them. ``ScatterND`` on the pools would write padding.
"""

from __future__ import annotations

OWNERS = """
  new_position = Add (n_col, token)
  new_entry = Div (new_position, L_0)
  M_0 = Squeeze (M)
  last_entry = Sub (M_0, one)
  new_entry_low = Min (new_entry, last_entry)
  table = Cast <to: int = 7> (page_table)
  new_page = GatherElements <axis: int = 1> (table, new_entry_low)
  new_offset = Mod (new_position, L_0)
  new_page_start = Mul (new_page, L_0)
  new_place = Add (new_page_start, new_offset)
  N_0 = Squeeze (N)
  page_from_0 = GreaterOrEqual (new_page, zero)
  page_below_N = Less (new_page, N_0)
  page_exists = And (page_from_0, page_below_N)
  has_room = Less (new_position, C_0)
  may_write = And (page_exists, has_room)
  writes = And (may_write, valid_token)
  places = Mul (N, L)
  places_0 = Squeeze (places)
  place_or_none = Where (writes, new_place, places_0)
  place_flat = Reshape (place_or_none, minus1)
  new_tokens = Shape (place_flat)
  new_tokens_0 = Squeeze (new_tokens)
  token_flat = Range (zero, new_tokens_0, one)
  places_and_none = Add (places, one)
  no_owner_0 = Constant <value_int: int = -1> ()
  no_owner = Expand (no_owner_0, places_and_none)
  owner_and_none = ScatterElements <axis: int = 0> (no_owner, place_flat, token_flat)
  owner = Slice (owner_and_none, axis0, places, axis0)
  owner_index = Max (owner, zero)
  owned = GreaterOrEqual (owner, zero)
  pool_shape = Concat <axis: int = 0> (N, L)
  owned_2 = Reshape (owned, pool_shape)
  owned_4 = Unsqueeze (owned_2, axes_1_3)
  kept_key = GatherND <batch_dims: int = 1> (key_f, slot_kv_ids)
  slot_used_3 = Unsqueeze (slot_used, axis2)
  used_by_token_shape = Concat <axis: int = 0> (B, R, S)
  used_by_token = Expand (slot_used_3, used_by_token_shape)
  used_token_first = Transpose <perm: ints = [0, 2, 1]> (used_by_token)
  used_flat_shape = Concat <axis: int = 0> (minus1, R)
  used_flat = Reshape (used_token_first, used_flat_shape)
  used_of_owner = Gather <axis: int = 0> (used_flat, owner_index)
  used_pool_shape = Concat <axis: int = 0> (N, L, R)
  used_pool = Reshape (used_of_owner, used_pool_shape)
  used_heads_first = Transpose <perm: ints = [0, 2, 1]> (used_pool)
  used_pool_4 = Unsqueeze (used_heads_first, axis3)
  key_owned = And (owned_4, used_pool_4)
"""
"""For every position of the pool the new token that goes there, and whether its row uses the slot."""


def append(what: str, rows: str, owned: str, heads: str, bits: int) -> str:
    """New ``rows``, float32 [B,X,S,W], into the pools of ``what`` ("key" or "value") where ``owned``."""
    text = f"""
  {what}_by_token = Transpose <perm: ints = [0, 2, 1, 3]> ({rows})
  {what}_rows_shape = Concat <axis: int = 0> (minus1, {heads}, W_{what})
  {what}_rows = Reshape ({what}_by_token, {what}_rows_shape)
"""
    if bits in (8, 4):
        text += (_QUANTISE_8 if bits == 8 else _QUANTISE_4).replace("X", what)
        text += _into_pool(f"{what}_cache", f"{what}_codes", owned, codes=True)
        text += _into_pool(f"{what}_scales", f"{what}_new_scales", owned)
    else:
        text += _into_pool(f"{what}_cache", f"{what}_rows", owned)
    return text


def _into_pool(pool: str, rows: str, owned: str, *, codes: bool = False) -> str:
    """``present_<pool>``: ``rows`` [B*S,X,columns] where ``owned``, the pool elsewhere."""
    gathered = f"""
  {pool}_gathered = Gather <axis: int = 0> ({rows}, owner_index)
  {pool}_columns = Shape <start: int = 1, end: int = 3> ({rows})
  {pool}_by_page = Concat <axis: int = 0> (N, L, {pool}_columns)
  {pool}_pages = Reshape ({pool}_gathered, {pool}_by_page)
  {pool}_heads = Transpose <perm: ints = [0, 2, 1, 3]> ({pool}_pages)
"""
    if not codes:
        return f"""{gathered}
  {pool}_new = CastLike ({pool}_heads, {pool})
  present_{pool} = Where ({owned}, {pool}_new, {pool})
"""
    # Through int32: runtimes have no Where for bytes.
    return f"""{gathered}
  {pool}_new = Cast <to: int = 6> ({pool}_heads)
  {pool}_old = Cast <to: int = 6> ({pool})
  {pool}_written = Where ({owned}, {pool}_new, {pool}_old)
  present_{pool} = CastLike ({pool}_written, {pool})
"""


_GROUPS = """
  X_grouped_shape = Concat <axis: int = 0> (keep2, minus1, group_1)
  X_grouped = Reshape (X_rows, X_grouped_shape)
"""

_RATIO = """
  X_scale_3 = Cast <to: int = 10> (X_scale_f)
  X_scale = Cast <to: int = 1> (X_scale_3)
  X_scale_is_0 = Equal (X_scale, zero_f)
  X_divisor = Where (X_scale_is_0, one_f, X_scale)
  X_ratio = Div (X_from_0, X_divisor)
  X_rounded = Round (X_ratio)
  X_clipped_low = Max (X_rounded, X_lowest)
  X_clipped = Min (X_clipped_low, X_highest)
  X_codes_4 = Where (X_scale_is_0, zero_f, X_clipped)
"""

_QUANTISE_8 = (
    _GROUPS
    + """
  X_highest = Constant <value_float: float = 127.0> ()
  X_lowest = Constant <value_float: float = -127.0> ()
  X_from_0 = Identity (X_grouped)
  X_size = Abs (X_grouped)
  X_largest = ReduceMax <keepdims: int = 1> (X_size, axis3)
  X_scale_f = Div (X_largest, X_highest)
"""
    + _RATIO
    + """
  X_rows_like = Shape (X_rows)
  X_codes = Reshape (X_codes_4, X_rows_like)
  X_new_scales = Squeeze (X_scale_3, axis3)
"""
)

_QUANTISE_4 = (
    _GROUPS
    + """
  X_highest = Constant <value_float: float = 15.0> ()
  X_lowest = Constant <value_float: float = 0.0> ()
  X_least = ReduceMin <keepdims: int = 1> (X_grouped, axis3)
  X_low_3 = Cast <to: int = 10> (X_least)
  X_low = Cast <to: int = 1> (X_low_3)
  X_largest = ReduceMax <keepdims: int = 1> (X_grouped, axis3)
  X_spread = Sub (X_largest, X_low)
  X_scale_f = Div (X_spread, X_highest)
  X_from_0 = Sub (X_grouped, X_low)
"""
    + _RATIO
    + """
  X_two = Unsqueeze (two, axis0)
  X_pairs_shape = Concat <axis: int = 0> (keep2, minus1, X_two)
  X_pairs = Reshape (X_codes_4, X_pairs_shape)
  X_places = Constant <value_floats: floats = [1.0, 16.0]> ()
  X_nibbles = Mul (X_pairs, X_places)
  X_codes = ReduceSum <keepdims: int = 0> (X_nibbles, axis3)
  X_scales_4 = Concat <axis: int = 2> (X_scale_3, X_low_3)
  X_new_scales = Squeeze (X_scales_4, axis3)
"""
)

WIDTHS = """
  W_key = Identity (D)
  W_value = Identity (Dv)
"""

WINDOW = """
  window_is_0 = Equal (attr_window, zero)
  all_positions = Add (C_0, S_0)
  window_any = Where (window_is_0, all_positions, attr_window)
  from_any = Sub (n_col, window_any)
  from_next = Add (from_any, one)
  not_before = GreaterOrEqual (position, from_next)
  below_total = Less (position, total_col)
  seen = And (not_before, below_total)
  seen_4 = Unsqueeze (seen, axes_1_3)
"""
"""The positions that any token of a row sees."""

PAGES = """
  N_last = Sub (N, one)
  table_low = Max (table, zero)
  pages = Min (table_low, N_last)
  as_positions = Concat <axis: int = 0> (keep2, C, minus1)
"""


def cached(what: str, pool: str, defined: str, bits: int) -> str:
    """``cached_<what>``: the rows of ``pool`` in float32 [B,X,C,W], zero where not ``defined``."""
    text = _rows_of(what, f"{pool}_cache", "stored")
    if bits in (8, 4):
        text += _rows_of(what, f"{pool}_scales", "stored_scales")
        text += (_LOAD_8 if bits == 8 else _LOAD_4).replace("X", what)
    else:
        text += f"  {what}_values = Identity ({what}_stored)\n"
    return text + f"  cached_{what} = Where ({defined}, {what}_values, zero_f)\n"


def _rows_of(what: str, pool: str, name: str) -> str:
    return f"""
  {what}_{name}_pages = Gather <axis: int = 0> ({pool}, pages)
  {what}_{name}_heads = Transpose <perm: ints = [0, 2, 1, 3, 4]> ({what}_{name}_pages)
  {what}_{name}_columns = Shape <start: int = 3, end: int = 4> ({pool})
  {what}_{name}_head_count = Shape <start: int = 1, end: int = 2> ({pool})
  {what}_{name}_shape = Concat <axis: int = 0> (B, {what}_{name}_head_count, C, {what}_{name}_columns)
  {what}_{name}_rows = Reshape ({what}_{name}_heads, {what}_{name}_shape)
  {what}_{name} = Cast <to: int = 1> ({what}_{name}_rows)
"""


_SCALED = """
  X_code_groups_shape = Concat <axis: int = 0> (keep3, minus1, group_1)
  X_code_groups = Reshape (X_unpacked, X_code_groups_shape)
  X_factor = Unsqueeze (X_factors, axis4)
  X_scaled = Mul (X_code_groups, X_factor)
"""
_FLAT = """
  X_flat_shape = Concat <axis: int = 0> (keep3, minus1)
"""

_LOAD_8 = (
    """
  X_unpacked = Identity (X_stored)
  X_factors = Identity (X_stored_scales)
"""
    + _SCALED
    + _FLAT
    + """
  X_values = Reshape (X_scaled, X_flat_shape)
"""
)

_LOAD_4 = (
    _FLAT
    + """
  X_16 = Constant <value_float: float = 16.0> ()
  X_sixteenths = Div (X_stored, X_16)
  X_high = Floor (X_sixteenths)
  X_high_part = Mul (X_high, X_16)
  X_low_nibble = Sub (X_stored, X_high_part)
  X_low_5 = Unsqueeze (X_low_nibble, axis4)
  X_high_5 = Unsqueeze (X_high, axis4)
  X_both = Concat <axis: int = 4> (X_low_5, X_high_5)
  X_unpacked = Reshape (X_both, X_flat_shape)
  X_scale_columns = Shape <start: int = 3, end: int = 4> (X_stored_scales)
  X_2 = Unsqueeze (two, axis0)
  X_half = Div (X_scale_columns, X_2)
  X_factors = Slice (X_stored_scales, axis0, X_half, axis3)
  X_minima = Slice (X_stored_scales, X_half, X_scale_columns, axis3)
"""
    + _SCALED
    + """
  X_minimum = Unsqueeze (X_minima, axis4)
  X_raised = Add (X_scaled, X_minimum)
  X_values = Reshape (X_raised, X_flat_shape)
"""
)
