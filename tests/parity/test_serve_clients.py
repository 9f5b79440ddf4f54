"""Clients that others wrote, against the server as users start it: each text is the one the runner makes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs chai-export[serve]")
pytest.importorskip("uvicorn", reason="needs chai-export[serve]")
pytest.importorskip("prometheus_client", reason="needs chai-export[serve]")
pytest.importorskip("llguidance", reason="needs chai-export[serve]")
pytest.importorskip("openai", reason="needs the openai package")

import openai
from transformers import AutoTokenizer

import chai_export as ce
from tests.helpers.served import Served, serving
from tests.helpers.tiny_graph import TinyModel

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% for tool in tools or [] %}tool {{ tool.function.name }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PROMPTS = [
    "This module provides",
    "Return True if the object is a function, and",
    "x",
    "The following example shows how to use the module: it reads a file and counts the words in it.",
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the demo's tokenizer, which knows all of JSON."""
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "examples" / "pydoc-5m")
    tokenizer.chat_template = TEMPLATE
    model = TinyModel(positions=700, bits=(8, 4), vocab=len(tokenizer))
    eos = [tokenizer.eos_token_id]
    return model.write(tmp_path_factory.mktemp("served") / "tiny", tokenizer=tokenizer, eos=eos).path


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Served]:
    with serving(bundle, "--max-rows", "4", "--max-waiting", "30") as served:
        yield served


@pytest.fixture(scope="module")
def runner(bundle: Path) -> ce.Runner:
    return ce.load(bundle, threads=1)


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def rendered(runner: ce.Runner, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    tokenizer = runner.tokenizer
    assert tokenizer is not None
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_completions_are_the_runner_s(client, runner):
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "seed": 6}):
        made = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=20, **options)
        expected = runner.generate(PROMPTS, max_new_tokens=20, **options)
        assert [choice.text for choice in made.choices] == [result.text for result in expected]
        names = {"eos": "stop", "length": "length"}
        assert [c.finish_reason for c in made.choices] == [names[r.stop_reason] for r in expected]
        assert made.usage.prompt_tokens == sum(result.prompt_tokens for result in expected)
        assert made.usage.completion_tokens == sum(len(result.token_ids) for result in expected)


def test_ids_stops_limits_and_choices_are_honoured(client, runner):
    ids = runner.tokenizer(PROMPTS[3])["input_ids"]
    (free,) = runner.generate([ids], max_new_tokens=30, temperature=1.0, seed=1)
    made = client.completions.create(model="tiny", prompt=ids, max_tokens=30, temperature=1.0, seed=1)
    assert made.choices[0].text == free.text
    stop = free.text[10:13]
    made = client.completions.create(
        model="tiny", prompt=ids, max_tokens=30, temperature=1.0, seed=1, stop=stop
    )
    assert made.choices[0].text == free.text[: free.text.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    made = client.completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=1, n=3, seed=1)
    alone = [runner.generate([ids], max_new_tokens=9, temperature=1.0, seed=1 + i)[0].text for i in range(3)]
    assert [choice.text for choice in made.choices] == alone
    assert len(set(alone)) > 1


def test_log_probabilities_are_the_model_s(client, runner):
    ids = runner.tokenizer(PROMPTS[3])["input_ids"]
    made = client.completions.create(
        model="tiny", prompt=ids, max_tokens=4, temperature=0, logprobs=3, echo=True
    )
    (choice,) = made.choices
    (result,) = runner.generate([ids], max_new_tokens=4)
    whole = [*ids, *result.token_ids]
    logits = runner.logits(whole)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert choice.logprobs.token_logprobs[0] is None
    found = choice.logprobs.token_logprobs[1:]
    assert found == pytest.approx([expected[i - 1, whole[i]] for i in range(1, len(whole))], abs=1e-4)
    for place, top in enumerate(choice.logprobs.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(expected[place].max(), abs=1e-4)
        assert len(top) in (3, 4)
    assert choice.text == PROMPTS[3] + result.text
    assert "".join(choice.logprobs.tokens[: len(ids)]) == "<s>" + PROMPTS[3]
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    nothing = client.completions.create(
        model="tiny", prompt=ids, max_tokens=0, logprobs=1, echo=True, temperature=0
    )
    assert nothing.choices[0].text == PROMPTS[3]
    assert nothing.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs[: len(ids)]
    assert nothing.usage.completion_tokens == 0


def test_a_stream_is_the_text_in_pieces(client, runner):
    (result,) = runner.generate([PROMPTS[1]], max_new_tokens=25)
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPTS[1], max_tokens=25, temperature=0, stream=True, echo=True,
            logprobs=1, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[-1].usage.completion_tokens == len(result.token_ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == PROMPTS[1] + result.text
    assert [piece.finish_reason for piece in pieces].count("length") == 1
    scored = [piece.logprobs for piece in pieces if piece.logprobs]
    whole = client.completions.create(
        model="tiny", prompt=PROMPTS[1], max_tokens=25, temperature=0, echo=True, logprobs=1
    ).choices[0]
    offsets = [offset for each in scored for offset in each.text_offset]
    assert offsets == whole.logprobs.text_offset
    assert [t for each in scored for t in each.tokens] == whole.logprobs.tokens
    counted = client.completions.create(
        model="tiny", prompt="x", max_tokens=4, temperature=0, stream=True,
        stream_options={"continuous_usage_stats": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert {chunk.usage.completion_tokens for chunk in counted} == {1, 2, 3, 4}


def test_many_at_once_are_each_what_they_are_alone(server, runner):
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        prompt, text = PROMPTS[number % 4], ""
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=10 + number, temperature=1, seed=number, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    for number, text in enumerate(asyncio.run(ask_all())):
        (alone,) = runner.generate(
            [PROMPTS[number % 4]], max_new_tokens=10 + number, temperature=1.0, seed=number
        )
        assert text == alone.text
    server.until(server.idle)


def test_a_client_that_leaves_frees_its_row(server, client):
    def leave(create: Any, **options: Any) -> None:
        stream = create(model="tiny", max_tokens=600, stream=True, extra_body={"ignore_eos": True}, **options)
        next(iter(stream))
        stream.close()

    before = server.metric("chai_aborted_texts_total")
    leave(client.completions.create, prompt="x", n=3)
    leave(client.chat.completions.create, messages=[{"role": "user", "content": "x"}])
    server.until(lambda: server.metric("chai_aborted_texts_total") == before + 4)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(
            model="tiny", prompt=["a"] * 20, max_tokens=600, extra_body={"ignore_eos": True}
        )
    server.until(lambda: server.metric("chai_aborted_texts_total") > before + 4)
    server.until(server.idle)


def test_a_chat_is_the_template_s_text(client, runner):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]},
    ]
    plain = [messages[0], {"role": "user", "content": "What is it?"}]
    (result,) = runner.generate([rendered(runner, plain)], max_new_tokens=15)
    made = client.chat.completions.create(model="tiny", messages=messages, max_tokens=15, temperature=0)
    assert made.choices[0].message.content == result.text
    assert made.usage.prompt_tokens == result.prompt_tokens
    (with_tool,) = runner.generate([rendered(runner, plain, tools=[WEATHER])], max_new_tokens=15)
    assert with_tool.prompt_tokens > result.prompt_tokens
    made = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=15, temperature=0, tools=[WEATHER],
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert made.choices[0].message.content == with_tool.text
    scored = made.choices[0].logprobs.content
    assert len(scored) == len(with_tool.token_ids)
    assert all(each.top_logprobs[0].logprob == each.logprob for each in scored)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=15, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == result.text
    assert chunks[-1].usage.total_tokens == result.prompt_tokens + len(result.token_ids)


def test_a_second_question_finds_the_first_in_the_cache(client, runner):
    history = [{"role": "user", "content": " ".join(PROMPTS) * 2}]
    first = client.chat.completions.create(model="tiny", messages=history, max_tokens=9, temperature=0)
    assert first.usage.prompt_tokens_details.cached_tokens < first.usage.prompt_tokens / 2
    history += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Why?"},
    ]
    second = client.chat.completions.create(model="tiny", messages=history, max_tokens=9, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 3
    (result,) = runner.generate([rendered(runner, history)], max_new_tokens=9)
    assert second.choices[0].message.content == result.text


def test_answers_follow_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"found": {"type": "boolean"}, "kind": {"enum": ["file", "folder"]}},
        "required": ["found", "kind"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    for seed in range(3):
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "?"}], response_format=wanted, seed=seed,
            max_tokens=100,
        )  # fmt: skip
        answer = json.loads(made.choices[0].message.content)
        assert isinstance(answer["found"], bool)
        assert answer["kind"] in ("file", "folder")
        assert made.choices[0].finish_reason == "stop"
    made = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=20, temperature=0,
        response_format={"type": "json_object"},
    )  # fmt: skip
    assert made.choices[0].message.content.lstrip()[0] == "{"
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="response_format has a schema"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "?"}], response_format=wrong
        )


def test_biases_and_penalties_change_what_is_chosen(client, runner):
    (plain,) = runner.generate(["x"], max_new_tokens=30)
    repeated = max(plain.token_ids.count(token) for token in plain.token_ids)
    wanted = runner.tokenizer("object")["input_ids"][-1]
    made = client.completions.create(
        model="tiny", prompt="x", max_tokens=3, temperature=0, logit_bias={str(wanted): 100}, logprobs=0
    )
    assert made.choices[0].logprobs.tokens == [runner.tokenizer.decode([wanted])] * 3
    made = client.completions.create(
        model="tiny", prompt="x", max_tokens=30, temperature=0, logprobs=0, presence_penalty=2,
        frequency_penalty=2, logit_bias={str(wanted): 3},
    )  # fmt: skip
    tokens = made.choices[0].logprobs.tokens
    assert max(tokens.count(token) for token in tokens) <= max(repeated, 3)
    assert tokens.count(runner.tokenizer.decode([wanted])) < 4


def test_models_are_listed(client, server):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has 'tiny'"):
        client.completions.create(model="other", prompt="x")
    assert json.loads(server.get("/health")) == {"status": "ok"}


def test_lm_eval_scores_it_as_it_scores_the_bundle(server, bundle, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from chai_export.quality.lm_eval_model import LogitsLM
    from chai_export.quality.lm_eval_tasks import evaluate_tasks
    from tests.parity.test_lm_eval import QUESTIONS, TASK

    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    seen: list[float] = []
    real = LocalCompletionsAPI.parse_logprobs

    def parse(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        seen.extend(logprob for logprob, _ in result)
        return result

    monkeypatch.setattr(LocalCompletionsAPI, "parse_logprobs", staticmethod(parse))
    settings = {
        "model": "tiny", "base_url": f"{server.url}/v1/completions", "tokenizer": str(bundle),
        "tokenizer_backend": "huggingface", "num_concurrent": 3, "max_length": 600, "add_bos_token": True,
    }  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=settings, tasks=["local_choice"], task_manager=manager,
        bootstrap_iters=0,
    )["results"]["local_choice"]  # fmt: skip
    alone: list[float] = []
    score = LogitsLM._score

    def scored(*arguments: Any) -> Any:
        result = score(*arguments)
        alone.append(result[0])
        return result

    monkeypatch.setattr(LogitsLM, "_score", scored)
    own = evaluate_tasks(bundle, ["local_choice"], task_path=tmp_path)["tasks"]["local_choice"]["chai"]
    assert {name.split(",")[0]: value for name, value in found.items() if name.split(",")[0] in own} == own
    assert len(seen) == sum(len(choices) for _, choices, _ in QUESTIONS)
    assert sorted(seen) == pytest.approx(sorted(alone[len(seen) :]), abs=1e-3)  # after those of all heads
