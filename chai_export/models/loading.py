"""Loading a decoder from a directory or the hub, with errors that a user can act on."""

from __future__ import annotations

import copy
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.arguments import path_of
from chai_export.errors import ChaiError, reason
from chai_export.files import read_json
from chai_export.models.folder import CONFIG, no_folder, require_config, require_weights
from chai_export.models.gguf_source import as_floats, gguf_of, our_progress, pretrained, require_gguf
from chai_export.models.quiet import quiet
from chai_export.models.support import require_supported
from chai_export.op.dtypes import Dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IN_A_LAYER = re.compile(r"\.\d+\.(?!.*(inv_freq|masked_bias|attn\.bias|rotary_emb)$)")
"""Weights of single layers but what old checkpoints hold of constants: masks and frequencies."""
_HUB_TIMEOUT_SECONDS = 8.0


def load_model(
    source: str | Path | PreTrainedModel, *, dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a decoder-only language model that the op can express.

    Args:
        source: a directory, a GGUF file, a hub id, or a model (used as it is, copied if its dtype differs).
        dtype: "float32", "float16" or "bfloat16" of the weights.
        trust_remote_code: run Python code that the model brings along.

    Returns:
        The model in evaluation mode on the CPU, all weights present.

    Raises:
        ChaiError: it does not exist, cannot be reached, is incomplete or damaged, needs remote code, is
            not a decoder, or computes attention that the op cannot express (by layer).
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel

    wanted = _torch_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        require_supported(source.config)
        model = source if source.dtype == wanted else copy.deepcopy(source).to(dtype=wanted)
        return model.eval()
    where, offline = resolve_source(source)
    config = load_config(source, trust_remote_code=trust_remote_code, offline=offline)
    require_supported(config)
    if isinstance(where, Path) and where.is_dir():
        require_weights(where)
    place, further = pretrained(where)
    given = further or {"config": config}  # transformers makes that of a GGUF file again, and needs to
    try:
        with quiet(), our_progress() if further else nullcontext(), torch.device("cpu"):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                place,
                **given,
                dtype=wanted,
                trust_remote_code=trust_remote_code,
                local_files_only=offline,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and torch each raise types of their own here
        raise ChaiError(
            f"the weights of {source} cannot be read ({reason(error)}); download the model again"
        ) from error
    _require_whole(source, config, info)
    if further:
        as_floats(loaded)
    return loaded.eval()


def load_config(source: str | Path, *, trust_remote_code: bool = False, offline: bool | None = None) -> Any:
    """Configuration of a directory or hub id.

    Raises:
        ChaiError: missing, unreachable, not valid JSON, of an unknown family, or in need of remote code.
    """
    from transformers import AutoConfig

    where, unreachable = resolve_source(source)
    if isinstance(where, Path) and where.is_file():
        require_gguf(where)
    elif isinstance(where, Path):
        require_config(where)
        _require_own_code(where, trust_remote_code)
    place, further = pretrained(where)
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                place,
                **further,
                trust_remote_code=trust_remote_code,
                local_files_only=unreachable if offline is None else offline,
            )
    except Exception as error:  # same as in load_model
        if "trust_remote_code" in str(error):
            raise ChaiError(_remote_code_message(source)) from error
        if isinstance(where, Path):
            file = where if where.is_file() else where / CONFIG
            raise ChaiError(f"{file} cannot be used ({reason(error)}); correct or replace it") from error
        raise ChaiError(_hub_message(where, error)) from error


def resolve_source(source: str | Path) -> tuple[Path | str, bool]:
    """(directory, GGUF file or hub id, whether only the local hub cache can be used).

    Raises:
        ChaiError: it reads like a path and no such directory exists.
    """
    text = str(path_of(source, "the model"))
    path = Path(text).expanduser()
    if path.is_dir():
        return gguf_of(path) or path, False
    if path.is_file():
        found = gguf_of(path)
        if found is not None:
            return found, False
        raise ChaiError(no_folder(path))
    if isinstance(source, Path) or path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise ChaiError(f"there is no model directory {text}; check the path or give a hub id (owner/name)")
    return text, not _hub_reachable()


def _hub_reachable() -> bool:
    """One quick request: the hub client itself would retry for half a minute before it gives up."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "0") not in ("0", ""):
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception:  # the client library behind the session varies, and so do its errors
        return False
    return True


def _require_own_code(directory: Path, trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING

    content = read_json(directory / CONFIG, fix="copy it again", exact=False)
    if content.get("auto_map") and content.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise ChaiError(_remote_code_message(directory))


def _require_whole(source: object, config: Any, info: dict[str, Any]) -> None:
    """Raise unless the weights are those of the configuration: transformers fills and drops without an error.

    Raises:
        ChaiError: weights are absent, or layers of the model have weights that it does not use.
    """
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ChaiError(
            f"{source} lacks {len(missing)} of its weights ({_some(missing)}); {_fix(config, missing)}"
        )
    unused = sorted(name for name in info.get("unexpected_keys") or [] if _IN_A_LAYER.search(name))
    if unused:
        raise ChaiError(
            f"{source} has weights in its layers without a place in its {CONFIG} ({_some(unused)}); use the "
            f"{CONFIG} that belongs to them"
        )


def _fix(config: Any, missing: list[str]) -> str:
    written_as = next(iter(getattr(config, "architectures", None) or []), "")
    headless = all("lm_head" in name or "embed_out" in name for name in missing)
    if headless and written_as and not written_as.endswith(("ForCausalLM", "LMHeadModel")):
        return f"it is a {written_as}, which has no output head for tokens; choose the model that writes text"
    return "download the model again"


def _some(names: list[str]) -> str:
    return ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])])


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, Dtype(name))


def _remote_code_message(source: object) -> str:
    return f"{source} brings Python code of its own, which is not run; --trust-remote-code allows it"


def _hub_message(hub_id: str, error: Exception) -> str:
    name = type(error.__cause__ or error).__name__
    if "RepositoryNotFound" in name or "not a valid model identifier" in str(error):
        return f"there is no model {hub_id} on the hub, nor a directory of that name; check the spelling"
    if "Gated" in name or "gated repo" in str(error):
        return f"{hub_id} is gated; accept its terms on the hub and log in with `hf auth login`"
    if "LocalEntryNotFound" in name or "connect" in str(error) or "offline" in str(error):
        return (
            f"{hub_id} is neither a directory nor in the local hub cache, and the hub cannot be reached; "
            "check the path or the network"
        )
    return (
        f"{hub_id} cannot be loaded from the hub ({reason(error)}); choose a model with {CONFIG} and weights"
    )
