"""Bodies of requests: OpenAI's fields that this server honours, and a few that other servers have too.

A field that is not here is refused by name: a text made without what it asks for would be a wrong answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_CHOICES = 128
MOST_LOGPROBS = 20

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Body):
    """``include_usage``: a last chunk with the numbers of tokens; ``continuous_usage_stats``: in every chunk.

    The second is of other servers; load generators ask for it.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generating(_Body):
    """What both kinds of requests have.

    ``top_k``, ``repetition_penalty`` and ``ignore_eos`` are not OpenAI's. ``user``, ``metadata``, ``store``
    and the like are taken and mean nothing here.
    """

    model: str | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("n", "presence_penalty", "frequency_penalty", "temperature", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stops(self) -> list[str]:
        """Texts that end a text."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk has the numbers so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


Ids = Annotated[list[int], Field(min_length=1)]


class Completion(Generating):
    """Body of ``POST /v1/completions``."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _best_is_all(self) -> Completion:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of other than n is not offered; leave it out and choose by logprobs")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, each a text or ids."""
        given: Any = self.prompt
        one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if one else list(given)


class TextPart(_Body):
    """A part of a message's content; of other kinds there are none here."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; what a template may use beside role and content is passed on."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None


class JsonSchema(_Body):
    """A named schema, which is always followed."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class TextFormat(_Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(_Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(_Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatCompletion(Generating):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletion:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise ValueError(
                "ignore_eos has no meaning for a text that ends by response_format; leave it out"
            )
        return self
