"""Command lines that are wrong somewhere: in an argument, a file that is read, a template, the streams.

Each is made from one seed, in a folder with a model, a bundle, clusters and texts (:class:`Material`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.helpers.bad_files import KINDS, put
from tests.helpers.command_server import ENCODINGS, STREAMS, Ended, Shell

LEAVES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -0.5, 1e308, "", "x", "7", "../../x", "a\0b",
    "\ud800", "é\u202e", [], {}, [[]], [None], ["x"], [1, "x"], {"x": 1}, {"": None}, [-1], [10**20],
)  # fmt: skip
"""What is put in the place of a value of a JSON file."""

WORDS = (
    "", " ", "-", "--", "---", "-o", "-h", "0", "-1", "1", "7", "1.5", "nan", "inf", "-inf", "1e999",
    "9" * 30, "9" * 5000, "x", "é", "\udcff", "\udced\udca0\udc80", "\U0001f600", "a\nb", "\x1b[31m", "=",
    ",", "1,2,3", "1,,2", "@", "@x", "elbow", "all", "budget:", "budget:2", "budget:nan", "budget:-0",
    "chai", "onnx", "onnxruntime", "tensorrt", "float32", "static", "../..", "/", "/dev/null", "/dev/zero",
    "/proc/self/mem", "~", "a/b", "a/b/c", "x" * 300, "x" * 5000, "--json", "--help", "%s", "{}", "$HOME",
    "*", "\\", "'", '"',
)  # fmt: skip
"""Arguments that somebody may give in place of any other."""

TEMPLATES = (
    "{{", "{% if %}", "{% endfor %}", "{{ 1 / 0 }}", "{{ messages.x.y }}", "{{ raise_exception('no') }}",
    "{{ nothing() }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}", "{% for i in range(10**9) %}x{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{{ messages[5] }}", "", " ", "\ud800", "{{ '\\ud800' }}", "{{ messages }}", "{{ 'x' * 3 }}",
    "{{ 'x'.format(1) }}", "{{ 10**10**3 }}", "{{ messages | nofilter }}", "{{ 'x' | tojson }}", 3, True,
    [], {}, {"default": "x"}, {"default": "{{"}, [{"name": "default", "template": "x"}], [{"name": "x"}],
    [1], ["x"],
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What command lines are made of; ``folder`` is scratch, the rest is never changed."""

    folder: Path
    model: Path
    bundle: Path
    onnx: Path
    clusters: Path
    text: Path


@dataclass(frozen=True)
class Case:
    """One command line."""

    arguments: list[str]
    shell: Shell
    what: str

    @property
    def wants_json(self) -> bool:
        return "--json" in self.arguments


def make_case(seed: int, material: Material) -> Case:
    """The command line of a seed; ``material.folder`` is emptied, and holds what it reads afterwards."""
    random = Random(seed)
    for entry in material.folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    arguments, what = random.choice(_MAKERS)(random, material)
    shell = Shell()
    if random.random() < 0.35:
        # A stream in four is not as usual.
        kinds = [random.choice(STREAMS) if random.random() < 0.25 else "kept" for _ in range(3)]
        shell = Shell(
            "kept" if kinds[0] != "closed" else "closed", kinds[1], kinds[2], random.choice(ENCODINGS)
        )
    if random.random() < 0.4:
        arguments = [*arguments, "--json"]
    return Case(arguments, shell, what)


def faults(case: Case, ended: Ended) -> list[str]:
    """What is wrong with the end of a command: it has one `error:` line, one JSON object, or a result."""
    shell, found = case.shell, []
    out, err = ended.out.decode(shell.encoding), ended.err.decode(shell.encoding)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if ended.code not in (0, 1, 2):
        found.append(f"exit code {ended.code}")
    for mark in (
        "Traceback",
        "Exception ignored",
        "error: unexpected",
        "[W:onnx",
        "[E:onnx",
        "panicked",
        "Warning:",
    ):
        if mark in err or mark in out:
            found.append(f"says {mark!r}")
    if any(not line.isprintable() for line in lines):
        found.append("an error line that is not printable")
    if ended.code == 0 and lines:
        found.append("an error line and exit code 0")
    if ended.code == 0 and shell.stdout in ("closed", "full"):
        found.append("exit code 0, but its result is nowhere")
    told = shell.stderr != "kept" or shell.stdout == "broken"
    if (
        ended.code != 0
        and len(lines) != 1
        and not told
        and not (ended.code == 1 and out.strip() and not lines)
    ):
        found.append(f"{len(lines)} error lines")
    if shell.stdout == "kept" and "--help" not in case.arguments and "-h" not in case.arguments:
        if ended.code == 0 and not out.strip() and "--stream" not in case.arguments:
            found.append("no result")
        if case.wants_json and out.strip() and not _one_object(out):
            found.append("stdout is not one JSON object")
    return found


_NOISE = ("Traceback", "Exception ignored", "error: unexpected", "[W:onnx", "[E:onnx", "panicked", "Warning:")


def _one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _text_case(random: Random, material: Material) -> tuple[list[str], str]:
    """A prompt of anything."""
    arguments = ["run", str(material.bundle), "--max-new-tokens", "2"]
    for _ in range(random.randint(1, 3)):
        flag = random.choice(
            ("--prompt", "--prompt", "--token-ids", "--stop", "--seed", "--temperature", "--top-k", "--top-p")
        )
        arguments.append(f"{flag}={_anything(random)}")
    if random.random() < 0.3:
        arguments.append(random.choice(("--chat", "--stream")))
    return arguments, "prompt"


def _prompt_file_case(random: Random, material: Material) -> tuple[list[str], str]:
    """A file of prompts that is none, or has a line that is none."""
    path = material.folder / random.choice(("p.txt", "p.jsonl"))
    if random.random() < 0.4:
        put(random.choice(KINDS), path)
    else:
        rows = [
            b'"x"',
            b'{"prompt": "x"}',
            b"[1, 2]",
            _anything(random).encode("utf-8", "surrogateescape" if random.random() < 0.5 else "replace"),
        ]
        rows += [
            json.dumps({"prompt": random.choice(LEAVES)}).encode(),
            json.dumps(random.choice(LEAVES)).encode(),
        ]
        path.write_bytes(b"\n".join(random.sample(rows, random.randint(1, 3))))
    return [
        "run",
        str(material.bundle),
        "--prompt-file",
        str(path),
        "--max-new-tokens",
        "2",
    ], f"prompt file {path.name}"


def _argument_case(random: Random, material: Material) -> tuple[list[str], str]:
    """A right command line with an argument replaced, left out, doubled or put in."""
    arguments = _right(random, material)
    for _ in range(random.randint(1, 2)):
        at = random.randrange(len(arguments))
        edit = random.choice(("replace", "drop", "insert", "double"))
        if edit == "drop":
            del arguments[at]
        elif edit == "double":
            arguments.insert(at, arguments[at])
        else:
            arguments[at : at + (edit == "replace")] = [
                _anything(random) if random.random() < 0.3 else random.choice(WORDS)
            ]
        arguments = arguments or ["run"]
    return arguments, "arguments"


def _right(random: Random, material: Material) -> list[str]:
    bundle, out = str(material.bundle), str(material.folder / "out")
    clusters, text = ("--clusters", str(material.clusters)), ("--text", str(material.text))
    return list(
        random.choice(
            (
                ("run", bundle, "--token-ids", "1,2,3", "--max-new-tokens", "2", "--max-seq", "16"),
                ("run", bundle, "--prompt", "w1 w2", "--max-new-tokens", "2", "--heads", "all"),
                ("inspect", bundle),
                ("inspect", str(material.onnx)),
                (
                    "calibrate",
                    str(material.model),
                    *text,
                    "-o",
                    out,
                    "--samples",
                    "1",
                    "--seq-len",
                    "16",
                    "--keep",
                    "all",
                ),
                ("eval", bundle, *text, "--max-tokens", "8", "--window", "8", "--prompts", "0"),
                ("rewrite", str(material.onnx / "none.onnx"), *clusters, "-o", out, "--probe-tokens", "3"),
                ("export", str(material.folder / "none"), *clusters, "-o", out, "--dtype", "float32"),
                ("verify", bundle, "--reference", str(material.folder / "none"), "--tolerance", "0.1"),
                ("build", bundle, "--backend", "tensorrt", "--max-batch", "2", "--max-seq", "16"),
                ("bench", "memory", bundle, "--context", "16"),
                ("package", bundle, "--triton-server", out),
                ("report", bundle, "-o", f"{out}.html"),
                ("compare", str(material.folder / "none"), *text, "--clusters", str(material.clusters)),
                ("make", str(material.folder / "none.yaml")),
                ("doctor",),
            )
        )
    )


def _clusters_case(random: Random, material: Material) -> tuple[list[str], str]:
    """A clusters.json that is none, read by a command that needs nothing else."""
    path = material.folder / "clusters.json"
    how = _spoil(random, material.clusters, path)
    command = random.choice(
        (
            [
                "export",
                str(material.folder / "none"),
                "--clusters",
                str(path),
                "-o",
                str(material.folder / "out"),
            ],
            ["rewrite", str(material.folder), "--clusters", str(path), "-o", str(material.folder / "out")],
            ["calibrate", str(material.folder / "none"), "--text", str(material.text), "-o", str(path)],
            [
                "calibrate",
                str(material.folder / "none"),
                "--text",
                str(material.text),
                "--keep",
                f"@{path}",
                "-o",
                str(material.folder / "out"),
            ],
        )
    )
    return command, f"clusters.json {how}"


def _manifest_case(random: Random, material: Material) -> tuple[list[str], str]:
    """A manifest that is none, or tells of another bundle."""
    bundle = _copy(material.bundle, material.folder / "bundle")
    how = _spoil(random, material.bundle / "manifest.json", bundle / "manifest.json")
    return _read_bundle(random, bundle), f"manifest.json {how}"


def _bundle_file_case(random: Random, material: Material) -> tuple[list[str], str]:
    """Another file of a bundle, with the hash that it really has."""
    bundle = _copy(material.bundle, material.folder / "bundle")
    name = random.choice(
        (
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.json",
            "generation_config.json",
            "clusters.json",
        )
    )
    how = _spoil(random, material.bundle / name, bundle / name)
    _state_hash(bundle, name)
    return _read_bundle(random, bundle), f"{name} of a bundle {how}"


def _template_case(random: Random, material: Material) -> tuple[list[str], str]:
    """A chat template that is none, fails, or does more than it may."""
    bundle = _copy(material.bundle, material.folder / "bundle")
    template = random.choice(TEMPLATES)
    if isinstance(template, str) and "\ud800" not in template and random.random() < 0.5:
        (bundle / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        settings = json.loads((bundle / "tokenizer_config.json").read_text())
        (bundle / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        _state_hash(bundle, "tokenizer_config.json")
    return ["run", str(bundle), "--prompt", "w1", "--chat", "--max-new-tokens", "2"], f"template {template!r}"


def _model_case(random: Random, material: Material) -> tuple[list[str], str]:
    """A model folder with a JSON file that is none."""
    model = _copy(material.model, material.folder / "model")
    name = random.choice(
        ("config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    )
    how = _spoil(random, material.model / name, model / name)
    out = str(material.folder / "out")
    command = random.choice(
        (
            [
                "calibrate",
                str(model),
                "--text",
                str(material.text),
                "-o",
                out,
                "--samples",
                "1",
                "--seq-len",
                "16",
            ],
            ["verify", str(material.bundle), "--reference", str(model), "--new-tokens", "1"],
        )
    )
    return command, f"{name} of a model {how}"


def _cache_case(random: Random, material: Material) -> tuple[list[str], str]:
    """The memory of hashes, which every command reads, is something else."""
    home = material.folder.parent / "chai_export"
    shutil.rmtree(home, ignore_errors=True)
    status = (material.bundle / "model.onnx").stat()
    entry = {f"{status.st_dev}:{status.st_ino}": [status.st_size, status.st_mtime_ns, "0" * 64]}
    right = material.folder / "hashes.json"
    right.write_text(json.dumps(entry))
    how = _spoil(random, right, home / "hashes.json")
    right.unlink()
    return _read_bundle(random, material.bundle), f"hash cache {how}"


def _recipe_case(random: Random, material: Material) -> tuple[list[str], str]:
    path = material.folder / "recipe.yaml"
    right = material.folder / "right.json"  # JSON is YAML
    right.write_text(
        json.dumps(
            {
                "model": str(material.folder / "none"),
                "calibrate": {"text": ["a"], "keep": "elbow"},
                "export": {},
                "verify": {},
            }
        )
    )
    how = _spoil(random, right, path)
    return ["make", str(path)], f"recipe {how}"


def _onnx_case(random: Random, material: Material) -> tuple[list[str], str]:
    """An ONNX file with bytes changed, and what lies beside it."""
    folder = _copy(material.onnx, material.folder / "onnx")
    kind = random.choice(("bytes", "config.json", "place"))
    if kind == "bytes":
        content = bytearray((folder / "model.onnx").read_bytes())
        for _ in range(random.randint(1, 8)):
            content[random.randrange(len(content))] = random.randrange(256)
        (folder / "model.onnx").write_bytes(
            content[: random.choice((len(content), random.randrange(len(content))))]
        )
    elif kind == "place":
        put(random.choice(KINDS), folder / random.choice(("model.onnx", "model.onnx.data")))
    else:
        name = "genai_config.json"
        kind = f"{name} {_spoil(random, material.onnx / name, folder / name)}"
    return ["inspect", str(folder / random.choice(("", "model.onnx")))], f"ONNX {kind}"


_MAKERS: tuple[Callable[[Random, Material], tuple[list[str], str]], ...] = (
    _text_case, _text_case, _prompt_file_case, _argument_case, _argument_case, _argument_case,
    _clusters_case, _manifest_case, _manifest_case, _bundle_file_case, _template_case, _model_case,
    _cache_case, _recipe_case, _onnx_case,
)  # fmt: skip


def _read_bundle(random: Random, bundle: Path) -> list[str]:
    return random.choice(
        (
            ["run", str(bundle), "--prompt", "w1 w2", "--max-new-tokens", "2"],
            ["run", str(bundle), "--token-ids", "1,2", "--max-new-tokens", "2"],
            ["inspect", str(bundle)],
            ["build", str(bundle), "--backend", "onnx"],
        )
    )


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def _state_hash(bundle: Path, name: str) -> None:
    """Let the manifest say what the file is now, as if it had been written so."""
    path = bundle / name
    if not path.is_file() or path.is_symlink():
        return
    manifest = json.loads((bundle / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _spoil(random: Random, right: Path, path: Path) -> str:
    """Put something else than ``right``, a JSON file, at ``path``; returns what."""
    how = random.choice(("kind", "bytes", "value", "value", "value"))
    if how == "kind":
        kind = random.choice(KINDS)
        put(kind, path)
        return kind
    path.parent.mkdir(parents=True, exist_ok=True)
    content = right.read_bytes()
    if how == "bytes":
        at = random.randrange(len(content))
        changed = (
            content[:at] + os.urandom(0) + bytes(random.randrange(256) for _ in range(random.randint(0, 4)))
        )
        path.write_bytes(changed + (content[at + random.randint(0, 4) :] if random.random() < 0.7 else b""))
        return f"byte {at}"
    document = json.loads(content)
    places = list(_places(document))
    holder, key = random.choice(places)
    value = random.choice(LEAVES)
    if random.random() < 0.15:
        del holder[key]
    else:
        holder[key] = value
    path.write_text(json.dumps(document))
    return f"{key!r} is {value!r}"


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _anything(random: Random) -> str:
    """Text of any bytes but NUL, as Python takes it from the system."""
    if random.random() < 0.3:
        return random.choice(WORDS)
    raw = bytes(
        random.choice((random.randrange(1, 256), random.randrange(32, 127)))
        for _ in range(random.randint(0, 12))
    )
    return os.fsdecode(raw)
