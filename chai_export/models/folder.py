"""What a folder that is given as a model lacks, or holds instead of one: one line each, with what to do.

transformers would say some of it in many lines, some late, and some not at all: with peft installed it loads
the base model of an adapter, without peft it loads the folder and drops the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from chai_export.errors import ChaiError
from chai_export.files import open_file, read_json

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers takes them."""
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_AGAIN = "download it again"
_POINTER = b"version https://git-lfs"
_ORIGINAL = "give the folder of the Hugging Face model: config.json with safetensors weights"


@dataclass(frozen=True)
class _Other:
    """A form of models that is not read here, told by the names of its files."""

    patterns: tuple[str, ...]
    what: str
    fix: str

    def sign(self, names: list[str]) -> str | None:
        """The first name that tells this form, if each pattern has one."""
        found = [next((n for n in names if fnmatch(n.lower(), pattern)), None) for pattern in self.patterns]
        return found[0] if all(found) else None


_OTHERS = (
    _Other(
        (ADAPTER,),
        "a LoRA adapter, not a whole model",
        "merge the adapter first: peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED)",
    ),
    _Other(("*.gguf",), "GGUF weights beside a configuration", "give the GGUF file itself"),
    _Other(("model_index.json",), "a diffusers pipeline, not a language model", "give a language model"),
    _Other(("*.nemo",), "a NeMo checkpoint", "convert it to a Hugging Face model with NeMo's own export"),
    _Other(("consolidated*",), "weights in their authors' own format", _ORIGINAL),
    _Other(("zero_to_fp32.py",), "a DeepSpeed checkpoint", "join it with its zero_to_fp32.py first"),
    _Other(("*.distcp",), "a distributed torch checkpoint", "save it with save_pretrained first"),
    _Other(("manifest.json", "model.onnx"), "a bundle", "give the model that it was made from"),
    _Other(("openvino_model.xml",), "an OpenVINO model", _ORIGINAL),
    _Other(("*.onnx",), "an ONNX model", "compile it with: chai-export rewrite"),
    _Other(("tf_model.h5",), "TensorFlow weights", _ORIGINAL),
    _Other(("flax_model.msgpack",), "Flax weights", _ORIGINAL),
    _Other(("*.pth",), "weights in their authors' own format", _ORIGINAL),
    _Other(("*.tar*",), "an archive", "unpack it first"),
    _Other(("*.zip",), "an archive", "unpack it first"),
)


def require_config(directory: Path) -> None:
    """Raise unless there is a config.json.

    Raises:
        ChaiError: says what is there instead, if that is known.
    """
    path = directory / CONFIG
    if path.is_file():
        _require_content(path)
        return
    names = _names(directory)
    if not names:
        raise ChaiError(f"{directory} is empty; give the folder of a Hugging Face model")
    other = _other(names)
    if other is not None:
        raise ChaiError(f"{directory} holds {other[1].what} ({other[0]}); {other[1].fix}")
    below = _models_below(directory)
    if below:
        raise ChaiError(f"{directory} has no {CONFIG}, but {below[0]} has one; give that folder")
    raise ChaiError(f"{directory} has no {CONFIG}, so it is no Hugging Face model; check the path")


def require_weights(directory: Path) -> None:
    """Raise unless the folder holds a whole set of weights that transformers finds, and no adapter to them.

    Raises:
        ChaiError: names the file that is absent or in the way.
    """
    names = _names(directory)
    if ADAPTER in names:
        raise ChaiError(
            f"{directory} holds a LoRA adapter beside a model ({ADAPTER}); merge the adapter first, or "
            "remove that file if it is merged already"
        )
    found = next((name for name in _WEIGHTS if name in names), None)
    if found is None:
        raise ChaiError(_no_weights(directory, names))
    _require_content(directory / found)
    if found.endswith(".index.json"):
        _require_shards(directory, found, names)


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds a tokenizer in any form.

    Raises:
        ChaiError: a file of it is a pointer of Git LFS.
    """
    found = [name for name in _TOKENIZERS if (directory / name).is_file()]
    for name in found:
        _require_content(directory / name)
    return bool(found)


def no_folder(path: Path) -> str:
    """What is wrong with a file that is given where a folder is expected."""
    other = _other([path.name])
    if other is not None:
        return f"{path} is {other[1].what}; {other[1].fix}"
    return f"{path} is a file; give the directory that holds {CONFIG} and the weights"


def _require_shards(directory: Path, index: str, names: list[str]) -> None:
    shards = read_json(directory / index, fix=_AGAIN, exact=False).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(n, str) for n in shards.values()):
        raise ChaiError(f"{directory / index} has no weight_map of file names; {_AGAIN}")
    files = sorted(set(shards.values()))
    missing = [name for name in files if name not in names]
    if missing:
        raise ChaiError(
            f"{directory} lacks {len(missing)} of the {len(files)} weight files that {index} names "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); download them again"
        )
    for name in files:
        _require_content(directory / name)


def _no_weights(directory: Path, names: list[str]) -> str:
    other = _other(names)
    if other is not None:
        return f"{directory} has no weights that are read, but {other[1].what} ({other[0]}); {other[1].fix}"
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pt"))]
    if len(others) == 1 and others[0].endswith(".safetensors"):
        return f"{directory} holds {others[0]}, but no {_WEIGHTS[0]}; rename it if these are all its weights"
    if others:
        return (
            f"{directory} holds {others[0]}, but neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}, which names all "
            f"parts; {_AGAIN}"
        )
    return f"{directory} has no weights (none of {', '.join(_WEIGHTS)}); download the model again"


def _require_content(path: Path) -> None:
    """Raise if a file is what Git leaves of it where LFS is not set up."""
    try:
        with open_file(path) as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise ChaiError(f"{path} cannot be read ({error.strerror}); check it or download it again") from error
    if start == _POINTER:
        raise ChaiError(f"{path} is a Git LFS pointer, not the file itself; run in its folder: git lfs pull")
    if not start:
        raise ChaiError(f"{path} is empty; {_AGAIN}")


def _names(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise ChaiError(f"{directory} cannot be read ({error.strerror}); check its permissions") from error


def _other(names: list[str]) -> tuple[str, _Other] | None:
    """The first of the table's forms that one of the names tells, with that name."""
    for other in _OTHERS:
        sign = other.sign(names)
        if sign is not None:
            return sign, other
    return None


def _models_below(directory: Path) -> list[Path]:
    """Folders of models one level below, or where the hub's cache has them; the newest first."""
    found = [*directory.glob(f"*/{CONFIG}"), *directory.glob(f"snapshots/*/{CONFIG}")]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]
