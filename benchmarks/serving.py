"""What serving gains on a random Llama of 370 M parameters: users at one time, and beginnings in common.

Writes benchmarks/results/serving-<name>.json:

* users: tokens per second of 16 texts at one time, of the same texts one after another, and their ratio, on
  one engine; where onnxruntime-genai is installed, of the same texts as one batch of its own, which begins
  and ends at one time, and one after another;
* prefix: milliseconds to the first token of a second question on a long prompt, with and without reuse, and
  whether the texts are the same;
* soak (``--soak SECONDS``): 64 clients over HTTP on the demo model, a third of which leave; texts that differ
  from those made alone, answers other than 200 and 429, and resident memory on the way.

Run it on a machine that does nothing else: python benchmarks/serving.py NAME [--work DIR]
``--work`` may be that of generate.py, whose bundles it uses. The first two take about fifteen minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import psutil
from generate import LAYERS, REPOSITORY, make_bundle, make_model

import chai_export as ce
from chai_export.bench import machine
from chai_export.bench.decoders import build_genai, genai_is_installed
from chai_export.clustering.clusters import Clusters
from chai_export.exporter.stage import export
from chai_export.runtime.sampling import SamplingSettings
from chai_export.serve.job import End, Event, Piece
from chai_export.serve.model import ServedModel, open_model

PATTERN = "paper_7b"
CLIENTS = 64


class Text:
    """A greedy text in the making."""

    def __init__(self, model: ServedModel, ids: list[int], new: int) -> None:
        self.events: Queue[Event] = Queue()
        self.job = model.job(ids, self.events.put, SamplingSettings(), max_new_tokens=new, ignore_eos=True)
        model.engine.submit([self.job])

    def finish(self) -> list[int]:
        tokens = []
        while isinstance(event := self.events.get(), Piece):
            tokens.append(event.token)
        assert isinstance(event, End)
        if event.error is not None:
            raise event.error
        return tokens

    @property
    def first_ms(self) -> float:
        return 1e3 * (self.job.request.token_times[0] - self.job.submitted)


def prompts_of(model: ServedModel, count: int, shortest: int, longest: int) -> list[list[int]]:
    choose = random.Random(0)
    vocabulary = model.manifest.vocab_size
    return [
        [choose.randrange(vocabulary) for _ in range(choose.randint(shortest, longest))] for _ in range(count)
    ]


class GenaiBatch:
    """onnxruntime-genai on the same weights, with the batches of its CPU build: padded to one length."""

    def __init__(self, work: Path, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        directory = work / "genai"
        if not directory.exists():
            build_genai(work / "model", directory, "float32", threads or len(os.sched_getaffinity(0)))
        config = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))
        self._padding = config["model"]["pad_token_id"]
        self._model = onnxruntime_genai.Model(str(directory))

    def texts(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = np.full((len(prompts), longest), self._padding, np.int32)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = ids
        parameters = self._genai.GeneratorParams(self._model)
        end = longest + new
        parameters.set_search_options(
            batch_size=len(prompts), max_length=end, min_length=end, do_sample=False
        )
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(padded)
        steps = []
        for _ in range(new):
            generator.generate_next_token()
            steps.append(np.array(generator.get_next_tokens()))
        return np.stack(steps, axis=1).tolist()


def users(bundle: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all ways take turns."""
    model = open_model(bundle, max_rows=arguments.users, reuse=False, threads=arguments.threads)
    prompts = prompts_of(model, arguments.users, 32, arguments.prompt)
    new = arguments.new_tokens

    def together() -> list[list[int]]:
        made = [Text(model, ids, new) for ids in prompts]
        return [text.finish() for text in made]

    def one_after_another() -> list[list[int]]:
        return [Text(model, ids, new).finish() for ids in prompts]

    ways = {"together": together, "one after another": one_after_another}
    if genai_is_installed():
        genai = GenaiBatch(work, arguments.threads)
        ways["onnxruntime-genai, together"] = lambda: genai.texts(prompts, new)
        ways["onnxruntime-genai, one after another"] = lambda: [
            text for ids in prompts for text in genai.texts([ids], new)
        ]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(arguments.rounds):
        for name, make in ways.items():
            begun = time.perf_counter()
            made = make()
            rates[name].append(sum(map(len, made)) / (time.perf_counter() - begun))
            assert texts.setdefault(name, made) == made
    model.close()
    medians = {name: sorted(rate)[len(rate) // 2] for name, rate in rates.items()}
    return {
        "users": arguments.users,
        "prompt_tokens": [len(ids) for ids in prompts],
        "new_tokens": arguments.new_tokens,
        "tokens_per_second": rates,
        "times": {name: medians["together"] / rate for name, rate in medians.items()},
        "same_texts": texts["together"] == texts["one after another"],
    }


def prefix(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The second of two questions of 16 tokens on one long prompt."""
    result: dict[str, Any] = {"prompt_tokens": arguments.long_prompt, "first_ms": {}}
    made = {}
    for reuse in (False, True):
        model = open_model(bundle, max_rows=2, reuse=reuse, threads=arguments.threads)
        (long,) = prompts_of(model, 1, arguments.long_prompt, arguments.long_prompt)
        questions = prompts_of(model, arguments.rounds + 1, 16, 16)
        Text(model, long + questions[0], 8).finish()
        times, made[reuse] = [], []
        for question in questions[1:]:
            text = Text(model, long + question, 16)
            made[reuse].append(text.finish())
            times.append(text.first_ms)
        result["first_ms"]["with reuse" if reuse else "without"] = times
        model.close()
    middle = {name: sorted(times)[len(times) // 2] for name, times in result["first_ms"].items()}
    return {
        **result,
        "times_sooner": middle["without"] / middle["with reuse"],
        "same_texts": made[True] == made[False],
    }


def soak(work: Path, seconds: float) -> dict[str, Any]:
    """Clients over HTTP for so many seconds, on the demo model."""
    bundle = work / "demo"
    if not bundle.exists():
        export(REPOSITORY / "examples" / "pydoc-5m", Clusters(kept_heads=(16, 16, 8, 5, 4, 4)), bundle)
    words = [sys.executable, "-m", "chai_export", "serve", str(bundle), "--port", "0", "--json"]
    server = subprocess.Popen(
        [*words, "--max-rows", "16", "--max-waiting", "32", "--cache-memory", "256MiB"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    lines = [server.stdout.readline()]
    while lines[-1] != "}\n":
        lines.append(server.stdout.readline())
    url = json.loads("".join(lines))["url"]
    asked, statuses, lock = {}, {}, threading.Lock()
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < end:
            body: dict[str, Any] = {
                "prompt": "This module provides " * choose.choice((1, 3, 20)) + str(choose.randrange(40)),
                "max_tokens": choose.choice((4, 30, 120)),
                "temperature": choose.choice((0.0, 1.0)),
                "seed": choose.randrange(4),
                "stream": True,
            }
            status, text = ask(url, body, leaves=number % 3 == 0)
            with lock:
                statuses[status] = statuses.get(status, 0) + 1
                if text is not None:
                    key = json.dumps({k: v for k, v in body.items() if k != "stream"})
                    asked.setdefault(key, set()).add(text)
            if status == 429:
                time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    resident = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        resident.append(psutil.Process(server.pid).memory_info().rss >> 20)
        time.sleep(max(1.0, seconds / 20))
    pages = {"held": -1.0, "kept": 0.0}
    while pages["held"] != pages["kept"]:
        with urllib.request.urlopen(url + "/metrics") as answer:
            figures = dict(
                line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#"
            )
        pages = {name: float(figures[f"chai_{name}_pages"]) for name in ("held", "kept")}
    server.send_signal(signal.SIGTERM)
    code = server.wait(timeout=60)
    runner = ce.load(bundle)
    wrong = 0
    for key, texts in asked.items():
        body = json.loads(key)
        (alone,) = runner.generate(
            [body["prompt"]], body["max_tokens"], temperature=body["temperature"], seed=body["seed"]
        )
        wrong += texts != {alone.text}
    return {
        "seconds": seconds,
        "statuses": statuses,
        "different_requests": len(asked),
        "texts_unlike_those_alone": wrong,
        "resident_mib": resident,
        "pages_at_the_end": pages,
        "exit_code": code,
    }


def ask(url: str, body: dict[str, Any], *, leaves: bool) -> tuple[int, str | None]:
    """Status, and the text if it was read to its end."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text = ""
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            for number, line in enumerate(answer):
                if leaves and number > 6:
                    return 200, None
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code, None
    return 200, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", help="of the machine, such as milan-2")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256, help="longest prompt of the users, in tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, default=2000, help="tokens that two questions share")
    parser.add_argument("--cache", default="8/4", help="bits of keys/values, or exact")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="64 clients over HTTP; 180 is the rule")
    parser.add_argument("--work", type=Path, help="keep models and bundles here")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script")
    parser.add_argument("--hidden", type=int, default=1024, help="smaller, to try the script")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = REPOSITORY / "benchmarks" / "results" / f"serving-{arguments.name}.json"
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "model").exists():
            make_model(work / "model", arguments.layers, arguments.hidden)
        bundle = make_bundle(work, PATTERN, arguments.cache, arguments.layers)
        settings = {"machine": machine.describe(), "pattern": PATTERN, "cache": arguments.cache}
        result = {**settings, "users": users(bundle, work, arguments), "prefix": prefix(bundle, arguments)}
        if arguments.soak:
            result["soak"] = soak(work, arguments.soak)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
