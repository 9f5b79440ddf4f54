"""Picture of a prompt's head maps: who represents whom, in every layer of a bundle.

    python benchmarks/head_map_picture.py engines/out/demo/bundle -o docs/images/head_map.svg

An SVG with a title and a description for screen readers; written as text, so it needs no plotting library.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

PROMPT = "This module provides a simple way to"
CELL, GAP, LEFT, TOP, RIGHT = 34, 4, 78, 92, 152
# Dark for a representative, light for the heads it stands for; told apart by shade and number too.
COLOURS = [
    ("#1f5a91", "#cfe1f2"), ("#a63d11", "#fbdcc9"), ("#3f6b1f", "#d9edc6"), ("#6c3a8e", "#e8d8f2"),
    ("#8a1c46", "#f6d0de"), ("#0f6a6a", "#c9ebe9"), ("#7a5a00", "#f5e6b8"), ("#4a4a4a", "#e2e2e2"),
]  # fmt: skip
ALONE = ("#ffffff", "#8a8f98")


def draw(maps: NDArray[np.int32], prompt: str) -> str:
    """SVG of head maps [L, H]."""
    layers, heads = maps.shape
    width = LEFT + heads * (CELL + GAP) + RIGHT
    height = TOP + layers * (CELL + GAP) + 48
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="title description" '
        'font-family="system-ui, sans-serif">',
        f'<title id="title">Head maps of the demo model for the prompt “{escape(prompt)}”</title>',
        f'<desc id="description">{escape(description(maps))}</desc>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(LEFT, 28, "Which head represents which", size=17, weight=600),
        text(LEFT, 50, f"Prompt: “{prompt}”", size=13, fill="#444b55"),
    ]
    for head in range(heads):
        parts.append(text(LEFT + head * (CELL + GAP) + CELL / 2, TOP - 10, str(head), anchor="middle"))
    parts.append(text(LEFT - 12, TOP - 10, "head", anchor="end"))
    for layer, head_map in enumerate(maps):
        parts.extend(row(layer, head_map.tolist()))
    parts.extend(legend(TOP + layers * (CELL + GAP) + 16))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def row(layer: int, head_map: list[int]) -> list[str]:
    """One layer: a cell per head with the number of its representative."""
    top = TOP + layer * (CELL + GAP)
    parts = [text(LEFT - 12, top + CELL / 2 + 5, f"layer {layer}", size=13, anchor="end", fill="#1d2127")]
    shared = [head for head in sorted(set(head_map)) if head_map.count(head) > 1]
    colour = {head: COLOURS[index % len(COLOURS)] for index, head in enumerate(shared)}
    for head, representative in enumerate(head_map):
        left = LEFT + head * (CELL + GAP)
        if representative not in colour:
            fill, stroke, ink = ALONE[0], ALONE[1], "#4d535c"
        elif representative == head:
            fill, stroke, ink = colour[head][0], colour[head][0], "#ffffff"
        else:
            fill, stroke, ink = (
                colour[representative][1],
                colour[representative][0],
                colour[representative][0],
            )
        parts.append(
            f'<rect x="{left + 0.5}" y="{top + 0.5}" width="{CELL - 1}" height="{CELL - 1}" rx="6" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )
        weight = 700 if representative == head else 400
        parts.append(
            text(left + CELL / 2, top + CELL / 2 + 5, str(representative), 14, "middle", ink, weight)
        )
    kept = len(set(head_map))
    label = f"{kept} of {len(head_map)} K heads kept"
    parts.append(text(LEFT + len(head_map) * (CELL + GAP) + 6, top + CELL / 2 + 4, label, fill="#1d2127"))
    return parts


def legend(top: float) -> list[str]:
    """What the three kinds of cells mean."""
    entries = [
        (COLOURS[0][0], COLOURS[0][0], "represents itself and others"),
        (COLOURS[0][1], COLOURS[0][0], "uses the scores of the head whose number it shows"),
        (ALONE[0], ALONE[1], "alone"),
    ]
    parts, left = [], float(LEFT)
    for fill, stroke, label in entries:
        parts.append(
            f'<rect x="{left + 0.5}" y="{top + 0.5}" width="15" height="15" rx="4" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )
        parts.append(text(left + 24, top + 13, label, fill="#1d2127"))
        left += 52 + 6.6 * len(label)
    return parts


def text(
    x: float, y: float, content: str, size: int = 12, anchor: str = "start", fill: str = "#5a616b",
    weight: int = 400,
) -> str:  # fmt: skip
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{fill}">{escape(content)}</text>'
    )


def description(maps: NDArray[np.int32]) -> str:
    """The same in words, layer by layer."""
    sentences = []
    for layer, head_map in enumerate(maps.tolist()):
        groups = [
            f"head {head} represents {', '.join(str(h) for h, r in enumerate(head_map) if r == head != h)}"
            for head in sorted(set(head_map))
            if head_map.count(head) > 1
        ]
        sentences.append(f"Layer {layer}: {'; '.join(groups) if groups else 'every head represents itself'}.")
    return " ".join(sentences)


def main() -> None:
    from chai_export.runtime.runner import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--prompt", default=PROMPT)
    arguments = parser.parse_args()
    runner = load(arguments.bundle)
    assert runner.tokenizer is not None
    runner.logits(runner.tokenizer(arguments.prompt)["input_ids"])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(draw(runner.head_maps[:, 0], arguments.prompt), encoding="utf-8")


if __name__ == "__main__":
    main()
