"""What the pages say about the tree and the command line is there: links, files, modules, commands."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from chai_export.cli.parser import parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for folder in ("", "docs/", "engines/", "examples/", "benchmarks/", "plugins/", "tests/")
    for page in ROOT.glob(f"{folder}*.md" if folder in {"", "engines/"} else f"{folder}**/*.md")
)
TOP_FOLDERS = r"(?:chai_export|plugins|tests|benchmarks|docs|engines|examples)"
MADE = ("engines/out/", "engines/tensorrt/", "engines/onnxruntime/", "build/gpu/", "1/model.py")
"""What commands make, in a recipe's folder, a bundle and a model repository."""
BASES = ("", "chai_export/", "plugins/", "plugins/include/")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def commands_of(text: str) -> Iterator[str]:
    """Lines of fenced blocks that begin with the command, continued ones joined, shell operators cut off."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("chai-export "):
                yield re.split(r"\s[&|#>]", line.strip())[0]


def parse(line: str) -> None:
    """A command line that is not taken fails the test; `--help` ends well."""
    try:
        parser().parse_args(shlex.split(line)[1:])
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"the command line does not take: {line}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    """Below the top folders, and in CONTRIBUTING's recipes below the package."""
    text = page.read_text(encoding="utf-8")
    names = re.findall(rf"[`\s({{]({TOP_FOLDERS}/[\w./*-]+)(?![\w./*<-])", text)
    names += re.findall(r"`([\w.*-]+(?:/[\w.*-]+)+\.(?:py|cpp|h|md|json|yaml|svg))`", text)
    for name in (named.rstrip("./") for named in names):
        found = any(list(ROOT.glob(base + name)) for base in BASES) or list(page.parent.glob(name))
        assert found or name.startswith(MADE), f"{name_of(page)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_modules_exist(page):
    for name in re.findall(r"\bchai_export(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")):
        parts = name.split(".")
        place = ROOT
        while parts and ((place / parts[0]).is_dir() or (place / f"{parts[0]}.py").is_file()):
            folder = place / parts[0]
            place = folder if folder.is_dir() else folder.with_suffix(".py")
            parts.pop(0)
        module = place / "__init__.py" if place.is_dir() else place
        if parts:
            said = re.search(rf"\b{parts[0]}\b", module.read_text(encoding="utf-8"))
            assert said, f"{name_of(page)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_the_pages_are_taken(page):
    for line in commands_of(page.read_text(encoding="utf-8")):
        parse(line)


def test_the_readme_has_commands_that_are_looked_at():
    assert len(list(commands_of((ROOT / "README.md").read_text(encoding="utf-8")))) >= 3


def subcommands(of: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command below a parser, such as `bench` and `bench memory`."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from subcommands(command)


@pytest.mark.parametrize("command", subcommands(parser()), ids=lambda command: command.prog)
def test_examples_of_the_help_are_taken(command):
    examples = (command.epilog or "").partition("example:\n")[2].splitlines()
    assert examples
    for line in examples:
        assert line.strip().startswith(command.prog)
        parse(line)
