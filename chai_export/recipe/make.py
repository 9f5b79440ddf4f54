"""Run a recipe: calibrate, export, build, verify, eval, run; each stage only if something changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chai_export.bundle.atomic import atomic_file, reserved
from chai_export.bundle.choices import Membership
from chai_export.bundle.manifest import FILE_NAME as MANIFEST
from chai_export.bundle.manifest import read_manifest
from chai_export.bundle.parts import BUNDLE
from chai_export.bundle.targets import require_directory_target, require_file_target
from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.plan import PLAN
from chai_export.clustering.plan_text import plan_sentences
from chai_export.clustering.plot import PICTURE, plot_curves
from chai_export.clustering.state import state_file
from chai_export.engines.build import build
from chai_export.errors import ChaiError
from chai_export.exporter.stage import export
from chai_export.files import read_json
from chai_export.op.precision import SAFE_BITS
from chai_export.quality.evaluate import evaluate
from chai_export.quality.verify import verify
from chai_export.recipe.cache import StageCache, stage_key
from chai_export.recipe.recipe import Recipe, RunSettings
from chai_export.units import bytes_of

CURVES = "error_curves.png"
Report = Callable[[str], None]


@dataclass
class MakeResult:
    """What a recipe produced. ``stages`` maps each stage to "done" or "up to date"."""

    output: Path
    bundle: Path
    stages: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON object of ``make --json``."""
        return {
            "output": str(self.output),
            "bundle": str(self.bundle),
            "stages": self.stages,
            **self.results,
        }


def make(recipe: Recipe, report: Report = lambda line: None) -> MakeResult:
    """Run the stages of a recipe that are not up to date.

    Args:
        recipe: from :func:`chai_export.recipe.recipe.load_recipe`.
        report: called with one line per stage.

    Raises:
        ChaiError: a stage failed (verification included); what finished before it is kept.
    """
    assert recipe.output is not None, "load_recipe resolves the output"
    StageCache(recipe.output)  # refuses a directory of somebody else
    with reserved(recipe.output / "make"):  # one at a time; the second finds what the first made
        return _Make(recipe, recipe.output, report).run()


class _Make:
    def __init__(self, recipe: Recipe, output: Path, report: Report) -> None:
        self._recipe = recipe
        self._output = output
        self._report = report
        self._cache = StageCache(output)
        planned = recipe.calibrate.keep is None
        self._clusters = output / ("plan.json" if planned else "clusters.json")
        self._static = recipe.export.membership is Membership.STATIC
        self._result = MakeResult(output, output / "bundle")

    def run(self) -> MakeResult:
        """All stages in order."""
        self._cache.begin()
        try:
            return self._run_stages()
        finally:
            self._cache.end()

    def _run_stages(self) -> MakeResult:
        recipe, bundle = self._recipe, self._result.bundle
        model = [Path(recipe.model)]
        common = {"model": recipe.model, "probe_tokens": recipe.probe_tokens}
        calibrate = {**common, **recipe.calibrate.model_dump()}
        texts = [*recipe.calibrate.text, *([recipe.calibrate.check] if recipe.calibrate.check else [])]
        self._stage("calibrate", calibrate, [*model, *texts], self._clusters.exists(), self._calibrate)
        export = {**common, **recipe.export.model_dump()}
        needed = [*model, self._clusters, *(recipe.calibrate.text if self._static else [])]
        exported = self._stage("export", export, needed, (bundle / MANIFEST).exists(), self._export)
        build = {**recipe.build.model_dump(), "export": exported}
        has_engine = recipe.build.backend in read_manifest(bundle).engines
        built = self._stage("build", build, [], has_engine, self._build)
        for name, settings, inputs, act in (
            ("verify", recipe.verify, [], self._verify),
            ("eval", recipe.eval, [recipe.eval.text] if recipe.eval else [], self._eval),
            ("run", recipe.run, [], self._generate_texts),
        ):
            if settings is not None:
                key = {**settings.model_dump(), "build": built}
                self._measure(name, key, inputs, act)
        return self._result

    def _stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Iterable[Path],
        has_output: bool,
        act: Callable[[], None],
    ) -> str:
        key = stage_key(settings, inputs)
        if has_output and self._cache.is_fresh(name, key):
            self._result.stages[name] = "up to date"
        else:
            self._report(f"{name} …")
            act()
            self._cache.record(name, key)
            self._result.stages[name] = "done"
        self._report(f"{name}: {self._result.stages[name]}")
        return key

    def _measure(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Iterable[Path],
        act: Callable[[], dict[str, Any]],
    ) -> None:
        """A stage whose output is one JSON file."""
        path = self._output / f"{name}.json"

        def write() -> None:
            result = act()
            with atomic_file(path) as file:
                file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

        self._stage(name, settings, inputs, path.exists(), write)
        self._result.results[name] = read_json(path, fix="delete it and make again")

    def _require_targets(self) -> None:
        """Raise before the long stages if something stands where an output goes.

        Raises:
            ChaiError: names it.
        """

        recipe = self._recipe
        measured_on = [settings.text for settings in (recipe.verify, recipe.eval) if settings is not None]
        sources = [recipe.model, *recipe.calibrate.text, *measured_on]
        output = Path(os.path.realpath(self._output))
        require_file_target(output / self._clusters.name, PLAN, sources)
        require_file_target(output / CURVES, PICTURE, sources)
        require_directory_target(output / self._result.bundle.name, BUNDLE, sources)

    def _calibrate(self) -> None:

        self._require_targets()
        settings = self._recipe.calibrate
        found = calibrate(
            self._recipe.model,
            settings.text,
            keep=settings.keep,
            loss=settings.loss,
            bytes_share=settings.bytes,
            check=settings.check,
            force=settings.force,
            samples=settings.samples,
            seq_len=settings.seq_len,
            probe_tokens=self._recipe.probe_tokens,
            measure=settings.measure,
            state=state_file(self._clusters),
            trust_remote_code=self._recipe.trust_remote_code,
        )
        found.save(self._clusters)
        if isinstance(found, Clusters):
            plot_curves(found, self._output / CURVES)
        else:
            for line in plan_sentences(found):
                self._report(line)

    def _export(self) -> None:

        export(
            self._recipe.model,
            self._clusters,
            self._result.bundle,
            dtype=self._recipe.export.dtype,
            probe_tokens=self._recipe.probe_tokens,
            key_bits=self._bits(self._recipe.export.key_bits),
            value_bits=self._bits(self._recipe.export.value_bits),
            membership=self._recipe.export.membership,
            text=self._recipe.calibrate.text if self._static else None,
            weights=self._recipe.export.weights,
            weight_block=self._recipe.export.weight_block,
            weight_method=self._recipe.export.weight_method,
            quantise_head=self._recipe.export.quantise_head,
            trust_remote_code=self._recipe.trust_remote_code,
        )

    def _bits(self, given: int | None) -> int | None:
        """As the recipe says, else as planned, else 8."""
        planned = self._recipe.calibrate.keep is None
        return SAFE_BITS if given is None and not planned else given

    def _build(self) -> None:

        settings = self._recipe.build
        memory = settings.cache_memory
        build(
            self._result.bundle,
            backend=settings.backend,
            max_batch=settings.max_batch,
            max_seq=settings.max_seq,
            cache_memory=None if memory is None else bytes_of(memory, "build.cache_memory"),
        )

    def _verify(self) -> dict[str, Any]:

        assert self._recipe.verify is not None
        result = verify(
            self._result.bundle,
            self._recipe.model,
            text=self._recipe.verify.text,
            backend=self._recipe.build.backend,
            trust_remote_code=self._recipe.trust_remote_code,
        )
        if not result.ok:
            raise ChaiError(
                f"verification failed ({json.dumps(result.to_json())}); the bundle must not be used, "
                f"see `chai-export verify {self._result.bundle} --reference {self._recipe.model}`"
            )
        return result.to_json()

    def _eval(self) -> dict[str, Any]:

        settings = self._recipe.eval
        assert settings is not None
        return evaluate(
            self._result.bundle,
            settings.text,
            backend=self._recipe.build.backend,
            max_tokens=settings.max_tokens,
            window=settings.window,
            prompts=settings.prompts,
            new_tokens=settings.new_tokens,
            reference=self._recipe.model if self._static else None,
            trust_remote_code=self._recipe.trust_remote_code,
        )

    def _generate_texts(self) -> dict[str, Any]:
        settings = self._recipe.run
        assert settings is not None
        manifest = read_manifest(self._result.bundle)
        return {
            "kv_bytes_per_token": {heads: manifest.kv_bytes_per_token(heads) for heads in ("all", "chai")},
            # Static membership has cut away the heads that it does not keep.
            **{
                heads: self._generate(settings, heads)
                for heads in (("chai",) if self._static else ("all", "chai"))
            },
        }

    def _generate(self, settings: RunSettings, heads: str) -> dict[str, Any]:
        from chai_export.runtime.report import run_report
        from chai_export.runtime.runner import load

        runner = load(self._result.bundle, backend=self._recipe.build.backend, heads=heads)
        generations = runner.generate(settings.prompts, max_new_tokens=settings.max_new_tokens)
        return run_report(runner, generations)
