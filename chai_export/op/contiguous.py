"""Function bodies for caches without pages: each row of the batch has its C positions side by side.

That is a pool with one page for each row, which holds row b's in place b. Caches are K [B,R,C,D] and V
[B,G,C,Dv] in T, there is no page table, and nothing but shapes decides how many steps a loop has:
what builders of engines for GPUs take. All else is docs/op.md's.
"""

from __future__ import annotations

from functools import lru_cache

import onnx

from chai_export.op import text_attend, text_cache, text_map
from chai_export.op.function import Form, parsed
from chai_export.op.schema import SHARED_OP_TYPE, signature

_PAGED_ONLY = {"page_table", "key_scales", "value_scales", "present_key_scales", "present_value_scales"}

_CAPACITY = "  C = Shape <start: int = 2, end: int = 3> (key_cache)\n"

_OWNERS = """
  offset = Sub (position, n_col)
  from_0 = GreaterOrEqual (offset, zero)
  below_m = Less (offset, m_col)
  owned = And (from_0, below_m)
  owned_4 = Unsqueeze (owned, axes_1_3)
  key_owned = And (owned_4, slot_used_4)
  last_token = Sub (S_0, one)
  offset_low = Max (offset, zero)
  owner = Min (offset_low, last_token)
  owner_3 = Unsqueeze (owner, axis2)
  kept_key = GatherND <batch_dims: int = 1> (key_f, slot_kv_ids)
"""
"""For every position [B,C] the new token that goes there, if one does."""

_APPEND = """
  X_by_token = Transpose <perm: ints = [0, 2, 1, 3]> (ROWS)
  X_of_owner = GatherND <batch_dims: int = 1> (X_by_token, owner_3)
  X_by_head = Transpose <perm: ints = [0, 2, 1, 3]> (X_of_owner)
  X_new = CastLike (X_by_head, X_cache)
  present_X_cache = Where (OWNED, X_new, X_cache)
"""

_READ = """
  key_defined = And (seen_4, slot_used_4)
  key_stored = Cast <to: int = 1> (PREFIXkey_cache)
  cached_key = Where (key_defined, key_stored, zero_f)
  value_stored = Cast <to: int = 1> (PREFIXvalue_cache)
  cached_value = Where (seen_4, value_stored, zero_f)
"""


def contiguous_inputs(op_type: str, form: Form) -> list[str]:
    """Names of the op's inputs that its function here takes, in order."""
    return [name for name in signature(op_type).input_names if name not in _absent(op_type, form)]


def contiguous_outputs(op_type: str, form: Form) -> list[str]:
    """Names of the op's outputs that its function here gives, in order."""
    return [name for name in signature(op_type).output_names if name not in _absent(op_type, form)]


def _absent(op_type: str, form: Form) -> set[str]:
    return form.absent(op_type) | _PAGED_ONLY


@lru_cache
def contiguous_proto(opset: int, form: Form, op_type: str) -> onnx.FunctionProto:
    """The function body of an op for caches without pages.

    Args:
        opset: version of the default ONNX domain, at least that of
            :data:`~chai_export.op.function.MIN_OPSET`.
        form: of the node, which stores in T.
        op_type: ClusteredHeadAttention or SharedClusteredHeadAttention.

    Raises:
        ValueError: the form stores in another type than T.
    """
    if form.key_bits or form.value_bits:
        raise ValueError(f"form {form.overload} stores in another type than T")
    terms = {"sinks": form.sinks, "slopes": form.slopes, "softcap": form.softcap}
    start = text_map.CONSTANTS + _CAPACITY + text_map.SIZES + text_map.ROWS + text_cache.WINDOW
    probe, attend = text_attend.probe(**terms), text_attend.attend(**terms)
    if op_type == SHARED_OP_TYPE:
        kept = text_map.KEPT_MAP + text_map.slots("kept_map")
        given = text_map.GIVEN_MAP + "  map_kv = Div (map, group_0)\n"
        body = start + kept + probe + given + _READ.replace("PREFIX", "") + attend
    else:
        chosen = text_map.chosen_map(text_map.steps_by_shape(sinks=form.sinks)) + text_map.slots("map")
        appended = _append("key", "kept_key", "key_owned") + _append("value", "value_f", "owned_4")
        body = start + probe + chosen + _OWNERS + appended + _READ.replace("PREFIX", "present_") + attend
    return parsed(
        op_type, contiguous_inputs(op_type, form), contiguous_outputs(op_type, form), body, opset, form
    )


def _append(what: str, rows: str, owned: str) -> str:
    return _APPEND.replace("X", what).replace("ROWS", rows).replace("OWNED", owned)
