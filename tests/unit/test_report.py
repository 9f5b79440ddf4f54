"""The report: one file, nothing fetched, nothing lost on a phone, every picture with words."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest

from chai_export.errors import ChaiError
from chai_export.report import collect, png, svg
from chai_export.report.page import chosen_point, render, tradeoff
from chai_export.report.peers import peers
from tests.helpers.tiny_graph import TinyModel

LAYERS, HEADS = 3, 8
MEASURE = """<script>
onload = () => {
  const page = document.getElementById("frame").contentDocument, root = page.documentElement;
  const all = (selector) => [...page.querySelectorAll(selector)];
  const beyond = (element) => element.getBoundingClientRect().right > root.clientWidth + 1;
  document.title = JSON.stringify({
    width: root.clientWidth,
    scroll: root.scrollWidth,
    outside: all("main > *, figure, .card, p, h1, h2").filter(beyond).map((e) => e.outerHTML.slice(0, 90)),
    images: page.images.length,
    broken: [...page.images].filter((image) => !image.complete || !image.naturalWidth).length,
    tables: all("table").filter((table) => !table.closest(".scroll")).length,
    charts: all("svg").filter((chart) => chart.clientHeight > 20).length,
  });
};
</script>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def row(saved, kl, method="chai", probe=5, kept=(8, 4, 4)):
    return {
        "method": method, "probe_tokens": probe, "kept_heads": list(kept), "kv_bytes_saved": saved,
        "perplexity_change": 10 * kl, "kl": kl,
    }  # fmt: skip


def data(**changes):
    maps = np.random.default_rng(0).integers(0, HEADS, (2, LAYERS, HEADS))
    content = {
        "bundle": {
            "source": {"kind": "hf", "name": "model-with-a-rather-long-name-" * 3, "model_type": "llama"},
            "dtype": "float32", "num_layers": LAYERS, "num_query_heads": HEADS, "num_kv_heads": HEADS,
            "head_dim": 16, "probe_tokens": 5, "static": None, "kept_heads": [8, 4, 4], "op_version": 2,
            "opset": 23, "created_with": "chai_export 0", "engines": [], "file_bytes": 12345,
            "kv_bytes_per_token": 300, "kv_bytes_per_token_all_heads": 400, "kv_bytes_saved": 0.25,
            "kv_bytes_per_token_float16": 200, "key_bits": [8, 4, 0], "value_bits": [4, 4, 16],
            "kv_bytes_by_part": {
                "all": {"keys": 200, "values": 200, "scales": 0},
                "chai": {"keys": 100, "values": 200, "scales": 0},
            },
            "proof": {"compared": "logits", "max_abs_diff": 1e-6, "tolerance": 1e-4},
        },
        "plan": None,
        "clusters": {"method": "elbow", "error_curves": [[8.0, 4, 2, 1, 0.5, 0.2, 0.1, 0.0]] * LAYERS},
        "cache": [{"tokens": n, "chai": 300 * n, "all": 400 * n} for n in (64, 128, 100000)],
        "head_maps": {
            "prompts": ["one <script>alert(1)</script>", "word" * 60], "maps": maps.tolist(),
            "stability": [1.0] * LAYERS, "grouping": [0.5] * LAYERS,
            "together": np.eye(HEADS)[None].repeat(LAYERS, 0).tolist(),
        },
        "correlations": np.eye(HEADS)[None].repeat(LAYERS, 0).tolist(),
        "eval": {"tokens": 9, "all": {"nll": 2.0, "perplexity": 7.4}, "chai": {"nll": 2.1, "perplexity": 8.2},
                 "top1_agreement": 0.9, "kl": 0.1,
                 "kl_by_position": [{"first": 0, "last": 0, "tokens": 3, "kl": 0.0},
                                    {"first": 16, "last": 31, "tokens": 6, "kl": 0.1234}],
                 "divergence": [{"prompt_tokens": 8, "new_tokens": 9, "first_difference": 5},
                                {"prompt_tokens": 8, "new_tokens": 9, "first_difference": None}]},
        "verify": {"ok": True, "max_abs_logit_diff": {"all": 1e-5, "chai": 2e-5}, "tolerance": 1e-4,
                   "head_map_agreement": 1.0},
        "texts": [
            {"prompt": "one", "new_tokens": 5, "exact": "a <b> c", "compiled": "a <b> d e", "common": 6,
             "first_difference": 2},
            {"prompt": "word" * 60, "new_tokens": 7, "exact": "x" * 300, "compiled": "x" * 300, "common": 300,
             "first_difference": None}],
        "compare": {"results": [row(0.1, 0.01), row(0.3, 0.5), row(0.1, 0.02, "random"), row(0.3, 0.4)]},
        "environment": {"python": "3"},
    }  # fmt: skip
    return {**content, **changes}


EMPTY = {
    "correlations": None,
    "texts": None,
    "eval": None,
    "verify": None,
    "compare": None,
    "clusters": {"method": None, "error_curves": []},
}


PLANNED = {
    "plan": {
        "rule": "loss 0.01", "layers": [], "kv_bytes_share": 0.4, "warning": None,
        "expected": {"perplexity_ratio": 1.008, "kl": 0.0075},
        "checked": {"perplexity_ratio": 1.0061, "kl": 0.0071, "tokens": 8176, "windows": 16,
                    "top1_agreement": 0.956, "perplexity_error": 0.0017},
        "parts": ["heads: none redundant", "keys in 8 bits: -23%", "values in 4 bits: -34%"],
        "tradeoff": [{"kv_bytes_share": share, "kl": kl, "perplexity_ratio": 1 + kl}
                     for share, kl in ((0.3, 4.0), (0.4, 0.008), (0.6, 0.0001), (1.0, 0.0))],
    }
}  # fmt: skip


def method(name, setting, share, kl, on_op=True):
    return {"method": name, "setting": setting, "on_op": on_op, "bytes_share": share, "kl": kl,
            "perplexity_change": kl, "perplexity_error": 0.001, "kl_by_quarter": [kl] * 4,
            "top1_agreement": 0.9}  # fmt: skip


def named(name, setting):
    return {"method": name, "setting": setting}


SCOREBOARD = {
    "model": "model", "tokens": 2044, "windows": 4, "seq_len": 512, "missing": {"slim": "there is <no> way"},
    "rows": [
        method("plan", "40%", 0.4, 0.01), method("plan", "20%", 0.2, 0.5), method("bits", "8/4", 0.41, 0.02),
        method("bits", "4/4", 0.31, 0.3), method("h2o", "200 positions", 0.2, 4.0, on_op=False),
        method("h2o", "100 positions", 0.1, 0.4, on_op=False),
    ],
    "at_equal_bytes": [
        {"plan": named("plan", "20%"), "on_op": None, "any": named("h2o", "100 positions")},
        {"plan": named("plan", "40%"), "on_op": named("bits", "4/4"), "any": named("bits", "4/4")},
    ],
}  # fmt: skip
COMPARED = {**PLANNED, "compare": SCOREBOARD}
COMPARED_ALONE = {"compare": SCOREBOARD}


def test_other_methods_stand_on_the_chart_of_the_plan_by_letter():
    page = render(data(**COMPARED))
    chart = next(svg for svg in re.findall(r"<svg .*?</svg>", page) if "this plan" in svg)
    found = re.findall(r"<g><title>(.*?)</title><(text|circle) class=\"peer (op|other)\".*?>(\w?)<", chart)
    assert [(title.split(":")[0], kind, style, letter) for title, kind, style, letter in found] == [
        ("h2o, 100 positions", "text", "other", "b"), ("plan, 20%", "circle", "op", ""),
        ("bits, 4/4", "text", "op", "a"), ("plan, 40%", "circle", "op", ""), ("bits, 8/4", "text", "op", "a"),
    ]  # fmt: skip
    places = [float(x) for x in re.findall(r"peer \w+\".*? c?x=\"([\d.]+)\"", chart)]
    assert places == sorted(places)
    assert "h2o 100 positions 10 %, +40.00 %" in re.search(r'aria-label="([^"]*)"', chart)[1]
    assert re.search(r"chosen for: loss 0\.01\.\s+Rings: plans", page)
    assert "Left out above the chart: 1." in page  # +400 %
    assert re.search(r'<b class="op">a</b> bits.*<b class="other">b</b> h2o', page)


def test_what_beats_a_plan_is_said_and_counted():
    found = peers(SCOREBOARD)
    assert found["kept"] == {"on_op": 2, "any": 1}
    assert [(each["any"]["row"]["method"], each["any"]["better"]) for each in found["verdicts"]] == [
        ("h2o", True), ("bits", False),
    ]  # fmt: skip
    page = render(data(**COMPARED))
    assert "better than a plan at 2 of\n2 sizes, no method at all at 1." in page
    assert page.count(", better</td>") == 1
    assert re.search(r"h2o 100 positions, 10\.0%</td><td class=\"number bad\">0\.4000, better", page)
    assert "slim is not there, or not at every size: there is &lt;no&gt; way." in page


def test_a_bundle_without_a_plan_has_the_chart_of_others_too():
    page = render(data(**COMPARED_ALONE))
    assert page.count('class="peer ') == 5
    assert "this plan" not in page
    assert peers({"results": []}) is peers(None) is None


def test_sample_texts_stand_side_by_side_with_what_differs_marked():
    page = render(data())
    assert "the first 2 of 5 tokens are the same" in page
    assert '<div class="text">a &lt;b&gt; <mark>d e</mark></div>' in page
    assert "all 7 tokens are the same" in page
    assert "What it writes" not in render(data(texts=None))


@pytest.mark.parametrize("changes", [{}, EMPTY, PLANNED, COMPARED, COMPARED_ALONE])
def test_the_page_is_self_contained_and_escapes_what_it_shows(changes):
    page = render(data(**changes))
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert not re.search(r"url\(|@import|<script|<link", page)
    assert "one &lt;script&gt;" in page
    assert page.count("<figure>") == page.count("</figure>") > LAYERS


@pytest.mark.parametrize("changes", [{}, EMPTY, PLANNED, COMPARED, COMPARED_ALONE])
def test_every_picture_has_a_text_alternative(changes):
    page = render(data(**changes))
    pictures = re.findall(r"<svg [^>]*>|<img [^>]*>", page)
    assert len(pictures) >= 2 * LAYERS if changes == {} else pictures
    for picture in pictures:
        text = re.search(r'(?:aria-label|alt)="([^"]*)"', picture)
        assert text, picture
        assert len(html.unescape(text[1])) > 20


def test_what_was_not_measured_is_said_with_the_command_that_measures_it():
    page = render(data(**EMPTY))
    for command in ("chai-export eval", "chai-export compare", "chai-export calibrate", "--reference"):
        assert command in page


def test_the_trade_off_shows_the_best_allocation_of_each_size_and_this_bundle():
    content = data()
    assert [(entry["kv_bytes_saved"], entry["kl"]) for entry in tradeoff(content)] == [
        (0.1, 0.01),
        (0.3, 0.4),
    ]
    assert chosen_point(content)["perplexity_change"] == pytest.approx(8.2 / 7.4 - 1)
    assert chosen_point(data(eval=None))["perplexity_change"] == pytest.approx(0.1)
    assert chosen_point(data(eval=None, compare=None)) is None


def test_a_plan_is_shown_with_what_was_expected_and_what_was_checked():
    page = render(data(**PLANNED))
    assert page.count('class="bits8"') > LAYERS
    assert 'class="bits0"' in page
    assert re.search(r"checked on 8176 unseen tokens</td><td class=.number.>\+0\.61 ± 0\.17 %", page)
    assert re.search(r"<td>expected</td><td class=.number.>\+0\.80 %", page)
    assert "heads: none redundant; keys in 8 bits: -23%" in page
    assert "The plan: 40.0 %, +0.61 %." in page
    assert "layer 1: keys of 4 of 8 heads in 4 bits, values in 4 bits" in page
    assert "Warning" not in page
    assert "Warning: it was forced." in render(data(plan={**PLANNED["plan"], "warning": "it was forced"}))


def test_divergence_by_position_and_of_texts_is_shown():
    page = render(data())
    assert re.search(r"16 to 31</td><td class=\"number\">6</td><td class=\"number\">0\.1234", page)
    assert re.search(r"5 of 9\s*,\s*none of 9\s*\.", page)


def test_a_static_bundle_says_what_was_cut_away_and_what_was_not_compared():
    content = data()
    static = {"parameters_saved": 12000, "parameters_before": 96000, "flops_saved_per_token": 24000}
    content["bundle"]["static"] = static
    content["verify"]["max_abs_logit_diff"] = {"all": None, "chai": 2e-5}
    page = render(content)
    assert "12,000 parameters\n(12.5%)" in page
    assert "attend with all heads" not in page
    assert "2e-05 with CHAI" in page


def test_a_matrix_becomes_a_png_of_its_values():
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    file = png.encode(pixels)
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", file[16:24]) == (3, 2)
    at = file.index(b"IDAT")
    content = zlib.decompress(file[at + 4 : at + 4 + struct.unpack(">I", file[at - 4 : at])[0]])
    assert content == b"\0" + pixels[0].tobytes() + b"\0" + pixels[1].tobytes()
    assert png.data_address(np.array([[1.0, -1.0], [np.nan, 5.0]])).startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 100, [0, 50, 100]), (0, 0.3, [0, 0.1, 0.2, 0.3]), (-3, 7, [0, 5])]
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert svg.ticks(low, high) == expected


def test_stability_counts_groups_apart_from_representatives():
    class Runner:
        tokenizer = None
        bundle = type("Bundle", (), {"manifest": type("Manifest", (), {"vocab_size": 99})})
        maps = iter([[[0, 0, 2, 2]], [[1, 1, 2, 2]]])

        def logits(self, ids):
            self.head_maps = np.array(next(self.maps))[:, None]

    found = collect.head_maps(Runner(), ["a", "b"])
    assert found["stability"] == [0.5]
    assert found["grouping"] == [1.0]
    assert found["together"][0][0] == [1, 1, 0, 0]


def test_a_file_that_is_not_a_command_s_output_is_named(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text('{"ok": true}')
    with pytest.raises(ChaiError, match="not the output of chai-export eval"):
        collect.read_result(path, "eval", "kl")
    path.write_text("no json")
    with pytest.raises(ChaiError, match="not valid JSON"):
        collect.read_result(path, "eval", "kl")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize(
    ("changes", "charts"), [({}, LAYERS + 5), (PLANNED, 6), (COMPARED, 5), (COMPARED_ALONE, LAYERS + 5)]
)
@pytest.mark.parametrize("width", [400, 1000])
def test_a_browser_shows_the_page_without_overflow(tmp_path, width, changes, charts):
    """The page in a frame of the given width; the outer page reports what the inner one measures."""
    content = data(**changes)
    style = f"width:{width}px;height:900px;border:0"
    frame = f'<iframe id="frame" style="{style}" srcdoc="{html.escape(render(content))}"></iframe>'
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><title>not run</title><body>{frame}{MEASURE}", encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=4000", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert seen["width"] == width
    assert seen["scroll"] <= width, seen
    assert seen["outside"] == []
    assert (seen["broken"], seen["images"]) == (0, LAYERS)
    assert seen["tables"] == 0
    assert seen["charts"] == charts


def test_the_cache_of_fewer_bits_is_shown_by_part(tmp_path):
    bundle = TinyModel(bits=(8, 4)).write(tmp_path / "b")
    facts = collect.compiled(bundle)
    content = data()
    assert facts["kv_bytes_by_part"]["chai"] == {"keys": 40, "values": 16, "scales": 52}
    names = ("kv_bytes_by_part", "kv_bytes_per_token_float16")
    content["bundle"] |= {name: facts[name] for name in names}
    page = render(content)
    assert "<tr><td>scales</td>" in page
    assert "all heads in float16" in page
    plain = collect.compiled(TinyModel().write(tmp_path / "plain"))["kv_bytes_by_part"]
    assert plain["chai"] == {"keys": 160, "values": 128, "scales": 0}
