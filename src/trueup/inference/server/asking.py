"""What requests may say. Absent and null are the same; what is unknown is ignored; what we cannot honour is refused."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trueup.inference.server.failures import not_valid, refuse
from trueup.inference.server.settings import Limits

_LIMITS = Limits()  # those of a request's shape are the same for every server
_TEMPLATES = "the server's operator chooses the chat template"
_GUIDED = "replies are kept to JSON schemas alone, by the response_format of a chat completion"
#: fields that mean something which this server does not do → why.
REFUSED = {
    "chat_template": _TEMPLATES,
    "chat_template_kwargs": _TEMPLATES,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this server writes text only",
    "modalities": "this server writes text only",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "this server fetches nothing",
    "prompt_embeds": "give text or token ids",
    "suffix": "models here write what follows, not what lies between",
    "continue_final_message": "an answer is always a new turn",
    "add_generation_prompt": "a prompt always ends where the assistant begins",
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "structured_outputs": _GUIDED,
    "use_beam_search": "answers are drawn token by token",
}
#: values that ask for what happens anyway.
_HARMLESS: dict[str, Collection[Any]] = {"modalities": (["text"],), "suffix": ("",), "use_beam_search": (False,)}
_HARMLESS |= {"add_generation_prompt": (True,), "continue_final_message": (False,)}

Asked = TypeVar("Asked", bound="Ask")
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class Ask(BaseModel):
    """Any request."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _honest(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name in REFUSED and given[name] not in _HARMLESS.get(name, ()):
                raise refuse(name, REFUSED[name], "unsupported_parameter")
        return given


class StreamOptions(Ask):
    include_usage: bool = False


class Draw(Ask):
    """What a completion and a chat completion have in common. None: as the server is set up."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[Token, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stop_token_ids: Annotated[list[Token], Field(max_length=_LIMITS.stops)] = []
    skip_special_tokens: bool = True
    n: Annotated[int, Field(ge=1, le=_LIMITS.choices)] = 1
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Draw:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "only with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Raises ApiError."""
        given = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        if not isinstance(given, list) or not all(isinstance(text, str) and text for text in given):
            raise refuse("stop", "expected a text or a list of texts, none of them empty")
        if len(given) > _LIMITS.stops or any(len(text) > 1024 for text in given):
            raise refuse("stop", f"at most {_LIMITS.stops} texts of at most 1,024 characters")
        return tuple(given)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


Messages = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=_LIMITS.messages)]


class AskChat(Draw):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_LIMITS.alternatives)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] = {"type": "text"}

    @model_validator(mode="after")
    def _can_be_done(self) -> AskChat:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "only with logprobs: true")
        if self.max_tokens == 0:
            raise refuse("max_tokens", "at least 1")
        return self


class AskCompletion(Draw):
    """POST /v1/completions."""

    prompt: Any
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=_LIMITS.alternatives)] | None = None
    best_of: int | None = None
    response_format: dict[str, Any] = {"type": "text"}

    @model_validator(mode="after")
    def _can_be_done(self) -> AskCompletion:
        if self.best_of is not None and self.best_of != self.n:
            raise refuse("best_of", "answers are not ranked here; ask for n", "unsupported_parameter")
        if self.response_format.get("type") != "text":
            raise refuse("response_format", "of chat completions only", "unsupported_parameter")
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "at least 1, or echo: true")
        if self.stream and self.echo and self.logprobs is not None:
            raise refuse("stream", "echo with logprobs comes in one piece", "unsupported_parameter")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts, or token ids. Raises ApiError."""
        given = self.prompt
        whole = isinstance(given, str) or (isinstance(given, list) and given and _is_id(given[0]))
        prompts = [given] if whole else given
        if not isinstance(prompts, list) or not prompts or not all(map(_is_prompt, prompts)):
            raise refuse("prompt", "expected a text, a list of texts, token ids, or a list of lists of token ids")
        if len(prompts) * self.n > _LIMITS.prompts:
            raise refuse("prompt", f"at most {_LIMITS.prompts} answers in a request")
        return prompts


class AskScore(Ask):
    """POST /v1/score: one conversation or several, each ending with the answer that is to be scored.

    `reference`: the id of what a policy is compared with; None: the base. `logprobs`: what both give each token of the
    answer. `complete`: whether the answers came to their end; the token that ends one counts only there.
    """

    model: str
    messages: Annotated[list[Any], Field(min_length=1, max_length=_LIMITS.messages)]
    beta: Annotated[Number, Field(gt=0, le=100)] = 0.1
    reference: str | None = None
    logprobs: bool = False
    complete: bool = True

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        """Raises ApiError."""
        several = self.messages if isinstance(self.messages[0], list) else [self.messages]
        for one in several:
            if not isinstance(one, list) or not all(isinstance(turn, dict) for turn in one) or len(one) < 2:
                raise refuse("messages", "expected a conversation that ends with an answer, or a list of them")
        return several


class AskTokens(Ask):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] = []
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> AskTokens:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("prompt", "give either prompt or messages")
        return self


class AskText(Ask):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Token]
    skip_special_tokens: bool = False


def read(kind: type[Asked], body: bytes) -> Asked:
    """A request of this kind. Raises ApiError."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise not_valid(error) from None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_id, value)))
