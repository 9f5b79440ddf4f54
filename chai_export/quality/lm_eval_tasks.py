"""lm-eval tasks on a bundle, with all heads and with CHAI: lm-eval's own, or a task file of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.bundle.choices import Backend
from chai_export.bundle.manifest import read_manifest
from chai_export.bundle.tokenizer import load_transformers_tokenizer
from chai_export.errors import ChaiError, UsageError, reason
from chai_export.models.reference import load_reference
from chai_export.models.text import leading_special_tokens
from chai_export.quality.limits import position_limit
from chai_export.quality.reference import Logits, reference_logits

if TYPE_CHECKING:
    from chai_export.runtime.runner import Runner

_MOST_TOKENS = 2048


def evaluate_tasks(
    bundle: str | Path,
    tasks: Sequence[str],
    *,
    backend: str = Backend.ONNXRUNTIME,
    task_path: str | Path | None = None,
    limit: int | None = None,
    reference: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Scores of a bundle on lm-eval tasks, zero-shot unless a task says otherwise.

    Args:
        bundle: directory of the bundle.
        tasks: lm-eval's names, or those of files in ``task_path``.
        backend: the engine to run, or "torch" for the torch oracle on ``reference``.
        task_path: folder with task files (YAML), searched besides lm-eval's own.
        limit: use so many examples of each task.
        reference: the Hugging Face model, for ``backend="torch"`` and for all heads of static membership.
        trust_remote_code: run code that the reference brings along.

    Returns:
        ``{"tasks": {task: {"all": {metric: value}, "chai": {…}}}, "limit": …, "backend": …}``.

    Raises:
        ChaiError: lm-eval is missing, a task is unknown or its data cannot be had, or the bundle cannot run.
        UsageError: ``backend="torch"`` or static membership without ``reference``.
    """
    lm_eval = _lm_eval()
    from chai_export.quality.lm_eval_model import LogitsLM

    results: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for heads in ("all", "chai"):
        logits, runner = _engine(bundle, backend, heads, reference, trust_remote_code=trust_remote_code)
        tokenizer = load_transformers_tokenizer(runner.bundle.path)
        if tokenizer is None:
            raise ChaiError(f"{bundle} has no tokenizer, which tasks need; export it with one")
        prefix = leading_special_tokens(tokenizer) or [_separator(tokenizer)]
        longest = min(position_limit(runner) or _MOST_TOKENS, _MOST_TOKENS)
        model = LogitsLM(logits, tokenizer, longest, prefix)
        for task, figures in _run(lm_eval, model, tasks, task_path, limit).items():
            results.setdefault(task, {})[heads] = figures
    return {"tasks": results, "limit": limit, "backend": backend}


def _engine(
    bundle: str | Path, backend: str, heads: str, reference: str | Path | None, *, trust_remote_code: bool
) -> tuple[Logits, Runner]:
    """What gives logits, and the runner that knows the bundle's tokenizer and limits."""
    from chai_export.runtime.runner import load

    manifest = read_manifest(Path(bundle))
    cut_away = heads == "all" and manifest.static is not None
    if backend != "torch" and not cut_away:
        runner = load(bundle, backend=backend, heads=heads)
        return runner.logits, runner
    if reference is None:
        why = "--backend torch" if backend == "torch" else f"{bundle} has static membership, and all heads"
        raise UsageError(f"{why}: the model it came from is needed; give --reference MODEL")
    model = load_reference(reference, manifest, trust_remote_code=trust_remote_code)
    runner = load(bundle, heads="chai")
    return reference_logits(model, runner.bundle, heads), runner


def _run(
    lm_eval: Any, model: Any, tasks: Sequence[str], task_path: str | Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    from lm_eval.tasks import TaskManager

    # Reading lm-eval's own thousands of task files takes many seconds; skip it where it is not needed.
    manager = TaskManager(include_path=None if task_path is None else str(task_path), include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ChaiError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and --task-path DIR "
            "adds a folder of your own"
        )
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0
        )
    except (OSError, ValueError, RuntimeError) as error:  # data sets that cannot be loaded raise any of these
        raise ChaiError(
            f"the tasks {', '.join(tasks)} cannot be run ({reason(error)}); their data sets are downloaded, "
            "so check the network, or use a task file with local data (--task-path)"
        ) from error
    return {
        task: {name.split(",")[0]: float(value) for name, value in figures.items() if _is_score(name, value)}
        for task, figures in found["results"].items()
    }


def _is_score(name: str, value: object) -> bool:
    return isinstance(value, (int, float)) and "," in name and "stderr" not in name


def _separator(tokenizer: Any) -> int:
    """A token to start from where the tokenizer puts none in front: BOS, else EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise ChaiError(
            "--tasks needs lm-eval; install it with pip install 'chai-export[quality]'"
        ) from error
    return lm_eval
