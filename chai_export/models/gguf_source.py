"""GGUF files as models: found, checked, and read by transformers, which makes floats of their blocks."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chai_export.errors import ChaiError, reason
from chai_export.files import open_file
from chai_export.progress import track

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")
"""What transformers reads such files with."""
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_ARCHITECTURE = "general.architecture"
_AGAIN = "download it again"


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path is, or that is all the model there is in a folder; None: there is none.

    Raises:
        ChaiError: there are several, or it is a part of one.
    """
    if path.is_file():
        found = [path] if path.suffix.lower() == _SUFFIX else []
    else:
        found = [] if (path / "config.json").exists() else sorted(_files(path))
    parts = [file for file in found if _PART.search(file.name)]
    if parts:
        count = int(_PART.search(parts[0].name)[1])  # type: ignore[index]
        raise ChaiError(
            f"{parts[0]} is one of {count} parts of a GGUF file; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3]) + (", …" if len(found) > 3 else "")
        raise ChaiError(f"{path} holds {len(found)} GGUF files ({names}); give one of them")
    return found[0] if found else None


def _files(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if file.suffix.lower() == _SUFFIX]
    except OSError as error:
        raise ChaiError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error


def require_gguf(path: Path) -> None:
    """Raise unless transformers reads a GGUF file.

    Raises:
        ChaiError: the package gguf is missing, the file is damaged, or of an architecture unknown to it.
    """
    try:
        with open_file(path) as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise ChaiError(f"{path} cannot be read ({error.strerror}); check it or {_AGAIN}") from error
    if start == b"vers":
        raise ChaiError(f"{path} is a Git LFS pointer, not the file itself; run in its folder: git lfs pull")
    if start != _MAGIC:
        raise ChaiError(f"{path} is no GGUF file, in spite of its name; {_AGAIN}")
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ChaiError(
                f"reading {path.name} needs the package {package}; pip install 'chai-export[gguf]'"
            )
    architecture = _architecture(path)
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES))
    if architecture not in known:
        raise ChaiError(
            f"{path} is of architecture {architecture!r}, which transformers does not read from GGUF (it "
            f"reads {', '.join(known)}); give the folder of the Hugging Face model"
        )


def pretrained(where: Path | str) -> tuple[Path | str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a source: folder or hub id, and further arguments."""
    if isinstance(where, Path) and where.is_file():
        return where.parent, {"gguf_file": where.name}
    return where, {}


@contextmanager
def our_progress() -> Iterator[None]:
    """Show transformers' progress over a GGUF file's tensors as this program shows its own."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def bar(items: Sequence[Any], **_: Any) -> Iterable[Any]:
        return track(items, "reading GGUF", total=len(items))

    theirs = reader.tqdm
    reader.tqdm = bar
    try:
        yield
    finally:
        reader.tqdm = theirs


def as_floats(model: Any) -> None:
    """Forget that weights were quantised: they are floats now, and nothing else is to be done with them."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _architecture(path: Path) -> str:
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field(_ARCHITECTURE)
        if field is not None:
            return str(field.contents())
    except Exception as error:  # a damaged file gives errors of numpy, struct and the package alike
        raise ChaiError(f"{path} cannot be read as GGUF ({reason(error)}); {_AGAIN}") from error
    raise ChaiError(f"{path} does not say of which architecture it is ({_ARCHITECTURE}); {_AGAIN}")
