"""A recipe file (``engines/*.yaml``): the settings of every stage, validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chai_export.bundle.choices import Backend, Membership
from chai_export.bundle.manifest import first_problem
from chai_export.clustering.measure import Measure
from chai_export.errors import ChaiError, reason
from chai_export.files import check_plain, read_text
from chai_export.graph.weights.quantise import Method, WeightType
from chai_export.op.dtypes import Dtype
from chai_export.op.probe import MEASURED_PROBE_TOKENS

_MOST_BYTES = 2**20

Count = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrateSettings(_Settings):
    """Settings of the offline phase; see `chai-export calibrate --help`."""

    text: list[Path]
    samples: Count | None = None
    seq_len: Count = 256
    loss: float | None = None
    bytes: float | None = None
    check: Path | None = None
    force: bool = False
    keep: str | None = None
    measure: Measure = Measure.ERROR


class ExportSettings(_Settings):
    """Settings of the export; see `chai-export export --help`."""

    dtype: Dtype = Dtype.FLOAT32
    membership: Membership = Membership.ONLINE  # static maps are decided on calibrate.text
    key_bits: Literal[16, 8, 4, 0] | None = None  # as planned, 8 without a plan
    value_bits: Literal[16, 8, 4, 0] | None = None
    weights: WeightType | None = None
    weight_block: Literal[32, 128] = 32
    weight_method: Method = Method.RTN
    quantise_head: bool = True


class BuildSettings(_Settings):
    """Settings of the engine; see `chai-export build --help`."""

    backend: Backend = Backend.ONNXRUNTIME
    max_batch: Count = 8
    max_seq: Count | None = None
    cache_memory: str | None = None  # such as 2GiB


class VerifySettings(_Settings):
    """Settings of the gate; see `chai-export verify --help`."""

    text: Path | None = None


class EvalSettings(_Settings):
    """Settings of the quality measurement; see `chai-export eval --help`."""

    text: Path
    max_tokens: Count | None = None
    window: Count = 512
    prompts: Annotated[int, Field(ge=0)] = 4
    new_tokens: Count = 32


class RunSettings(_Settings):
    """Prompts to continue, with all heads and with CHAI."""

    prompts: list[str]
    max_new_tokens: Count = 64


class Recipe(_Settings):
    """One recipe. Paths are relative to the recipe's folder; the output defaults to ``out/<name>``."""

    name: str
    model: str
    output: Path | None = None
    probe_tokens: Count = MEASURED_PROBE_TOKENS
    trust_remote_code: bool = False
    calibrate: CalibrateSettings
    export: ExportSettings = ExportSettings()
    build: BuildSettings = BuildSettings()
    verify: VerifySettings | None = VerifySettings()
    eval: EvalSettings | None = None
    run: RunSettings | None = None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe and resolve its paths.

    Raises:
        ChaiError: the file is missing, is not YAML, or a setting is wrong; names the setting.
    """
    fix = "see engines/demo.yaml for an example"
    text = read_text(path, fix=fix, most=_MOST_BYTES)
    try:
        content: Any = yaml.safe_load(text)
        check_plain(content)
    except RecursionError:
        raise ChaiError(f"recipe {path} is nested too deeply; {fix}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ChaiError(f"recipe {path} is not YAML ({error.problem}{line}); mend it") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ChaiError(f"recipe {path} is not YAML ({reason(error)}); mend it") from None
    if not isinstance(content, dict):
        raise ChaiError(f"recipe {path} is empty or no mapping; {fix}")
    try:
        recipe = Recipe.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise ChaiError(f"recipe {path}: {first_problem(error)}; mend it there") from error
    return _resolve(recipe, path.parent)


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    """Paths as seen from the recipe's folder; a model that is no folder there stays a hub id."""
    model = folder / recipe.model
    update: dict[str, Any] = {
        "model": str(model) if model.exists() or recipe.model.startswith((".", "/")) else recipe.model,
        "output": folder / (recipe.output or Path("out") / recipe.name),
        "calibrate": recipe.calibrate.model_copy(
            update={"text": [folder / text for text in recipe.calibrate.text]}
        ),
    }
    if recipe.calibrate.check is not None:
        checked = {"check": folder / recipe.calibrate.check}
        update["calibrate"] = update["calibrate"].model_copy(update=checked)
    if recipe.eval is not None:
        update["eval"] = recipe.eval.model_copy(update={"text": folder / recipe.eval.text})
    if recipe.verify is not None and recipe.verify.text is not None:
        update["verify"] = recipe.verify.model_copy(update={"text": folder / recipe.verify.text})
    return recipe.model_copy(update=update)
