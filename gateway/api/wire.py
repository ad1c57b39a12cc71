"""What clients may send: bounded, typed requests in OpenAI's shapes.

Unknown fields stay legal, because clients send extras. A field that is known and would change the meaning of the answer
is either served or refused by name; it is never silently ignored. `null` always means "not given".

JSON is read strictly: UTF-8 only, no NaN or Infinity, no name twice in one object (two parsers could disagree on which
one counts), no lone surrogates.
"""

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from engine.protocol import (
    BIAS_MAX,
    LOGPROBS_MAX,
    PENALTY_MAX,
    PROMPT_LOGPROBS_MAX,
    REPETITION_PENALTY_MAX,
    REPETITION_PENALTY_MIN,
)
from gateway.api.problems import InvalidRequestError
from gateway.api.structure import Structured

MESSAGES_MAX = 4_096
PARTS_MAX = 1_024  # content parts of one message
STOP_MAX = 4  # OpenAI's limit
STOP_CHARS_MAX = 256
CACHE_SALT_CHARS_MAX = 256
N_MAX = 8  # answers to one request
COMPLETION_LOGPROBS_MAX = 5  # OpenAI's
LOGIT_BIAS_MAX = 1_024  # tokens with a bias
STOP_TOKEN_IDS_MAX = 64
TOKEN_ID_DIGITS_MAX = 10
ROLES = frozenset({"system", "developer", "user", "assistant"})

Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # 0 and -1 keep all, as in vLLM
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(ge=REPETITION_PENALTY_MIN, le=REPETITION_PENALTY_MAX)]
Penalty = Annotated[float, Meta(ge=-PENALTY_MAX, le=PENALTY_MAX)]
Bias = Annotated[float, Meta(ge=-BIAS_MAX, le=BIAS_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
CacheSalt = Annotated[str, Meta(max_length=CACHE_SALT_CHARS_MAX)]
ServiceTier = Literal["auto", "default", "flex", "priority", "batch"]
StopText = Annotated[str, Meta(min_length=1, max_length=STOP_CHARS_MAX)]


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's name for a stream that hides how long its tokens are


class TextPart(Struct, frozen=True):
    type: str
    text: str | None = None


class Message(Struct, frozen=True):
    role: str
    content: str | list[TextPart] | None = None
    tool_calls: Any = None
    function_call: Any = None


class Common(Structured, frozen=True, kw_only=True):
    """The fields that both completion routes share."""

    model: ModelName
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Annotated[int, Meta(ge=1, le=N_MAX)] | None = None
    stop: str | list[StopText] | None = None
    seed: Seed | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=STOP_TOKEN_IDS_MAX)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=PROMPT_LOGPROBS_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: ServiceTier | None = None
    cache_salt: Annotated[str, Meta(max_length=CACHE_SALT_CHARS_MAX)] | None = (
        None  # subdivides the tenant's prefix cache
    )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def tier(self) -> str:
        """The service tier that is asked for; ``auto`` is the default one."""
        return "default" if self.service_tier in (None, "auto") else self.service_tier

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def cover(self) -> bool | None:
        return self.stream_options.include_obfuscation if self.stream_options else None

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token id, bias). Raises InvalidRequestError where a name is no token id, or one has two spellings."""
        found: dict[int, float] = {}
        for name, bias in (self.logit_bias or {}).items():
            if not name.isascii() or not name.isdigit() or len(name) > TOKEN_ID_DIGITS_MAX or int(name) in found:
                raise InvalidRequestError(f"{name[:32]!r} is not a token id of its own", "logit_bias")
            found[int(name)] = bias
        return tuple(found.items())


class ChatRequest(Common, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None

    @property
    def num_logprobs(self) -> int:
        """As SamplingParams has it: -1 for none at all."""
        return self.top_logprobs or 0 if self.logprobs else -1

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Common, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=COMPLETION_LOGPROBS_MAX)] | None = None
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


RequestT = TypeVar("RequestT", bound=Common)


def parse_chat(body: bytes) -> ChatRequest:
    """Raises InvalidRequestError naming the field."""
    request = _parse(body, ChatRequest)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequestError(
            f"it is {request.max_completion_tokens} and max_tokens is {request.max_tokens}: send only one of them",
            "max_completion_tokens",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", "top_logprobs")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises InvalidRequestError naming the field."""
    request = _parse(body, CompletionRequest)
    prompt_of(request)
    return request


def prompt_of(request: CompletionRequest) -> str | list[int]:
    """The one prompt of a completion: a text, or token ids (not yet checked against the vocabulary)."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise InvalidRequestError("prompt is empty: send a text or a list of token ids", "prompt")
    if all(isinstance(item, int) for item in prompt):
        return prompt  # type: ignore[return-value]
    if len(prompt) > 1:
        raise InvalidRequestError("prompt holds several prompts: send one request for each", "prompt")
    only = prompt[0]
    assert not isinstance(only, int)
    return only


def content_text(message: Message) -> str:
    """A message's content as one text; its parts are joined as they are."""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text or "" for part in message.content or ())


# --- reading ----------------------------------------------------------------------------------------------------------


def _parse(body: bytes, kind: type[RequestT]) -> RequestT:
    fields = strict_json(body)
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object", None, "invalid_type")
    for name, accepts, supported in UNSUPPORTED + (UNSUPPORTED_IN_CHAT if kind is ChatRequest else ()):
        value = fields.get(name)
        if value is not None and not accepts(value):
            raise InvalidRequestError(f"{name} is not supported: {supported}", name, "unsupported_value")
    try:
        request = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _named(error) from error
    _check_stop(request)
    if len(request.biases) > LOGIT_BIAS_MAX:
        raise InvalidRequestError(f"logit_bias names more than {LOGIT_BIAS_MAX} tokens", "logit_bias")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequestError(
            "prompt_logprobs are not sent in a stream: leave out stream", "prompt_logprobs", "unsupported_value"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream: true", "stream_options")
    return request


def strict_json(body: bytes) -> Any:
    """The value in `body`. Raises InvalidRequestError with code invalid_json."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_name_twice, parse_constant=_no_constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate has no encoding
    except RecursionError as error:
        raise InvalidRequestError("the body is nested too deeply", None, "invalid_json") from error
    except ValueError as error:  # JSONDecodeError, UnicodeError and too many digits are all ValueErrors
        raise InvalidRequestError(f"the body is not valid JSON: {_first_line(error)}", None, "invalid_json") from error
    return value


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _first_line(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "a text holds half a surrogate pair"
    return str(error).splitlines()[0][:200]


_PATH = re.compile(r" - at `(?:key in )?\$(?P<path>.*)`\Z")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


def _named(error: msgspec.ValidationError) -> InvalidRequestError:
    """msgspec's message with its JSON path turned into OpenAI's `param`."""
    text = str(error)
    found = _PATH.search(text)
    param = found["path"].lstrip(".").replace("[...]", "") if found else ""
    reason = text[: found.start()] if found else text
    missing = _MISSING.search(reason)
    if missing:
        param = f"{param}.{missing['name']}" if param else missing["name"]
        return InvalidRequestError(f"{param} is required", param, "missing_required_parameter")
    code = "invalid_type" if ", got " in reason else "invalid_value"
    return InvalidRequestError(f"{param or 'body'}: {reason}", param or None, code)


def _check_stop(request: Common) -> None:
    texts = request.stop_texts
    if len(texts) > STOP_MAX:
        raise InvalidRequestError(f"stop holds {len(texts)} texts, at most {STOP_MAX} are allowed", "stop")
    if any(not 1 <= len(text) <= STOP_CHARS_MAX for text in texts):
        raise InvalidRequestError(f"each stop text must have 1 to {STOP_CHARS_MAX} characters", "stop")


def _check_message(message: Message, path: str) -> None:
    if message.role not in ROLES:
        role = message.role[:32]
        raise InvalidRequestError(
            f"role {role!r} is not supported: use one of {', '.join(sorted(ROLES))}", f"{path}.role"
        )
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequestError(
                f"{name} is not supported: tools are not served", f"{path}.{name}", "unsupported_value"
            )
    if message.content is None:
        raise InvalidRequestError("content must be a text or a list of text parts", f"{path}.content")
    if isinstance(message.content, str):
        return
    if not 1 <= len(message.content) <= PARTS_MAX:
        raise InvalidRequestError(f"content must have 1 to {PARTS_MAX} parts", f"{path}.content")
    for index, part in enumerate(message.content):
        if part.type != "text":
            kind = part.type[:32]
            raise InvalidRequestError(
                f"content type {kind!r} is not supported: only text is", f"{path}.content[{index}].type"
            )
        if part.text is None:
            raise InvalidRequestError("text is required", f"{path}.content[{index}].text", "missing_required_parameter")


# --- known fields that would change the answer ------------------------------------------------------------------------


def _one_of(*values: Any) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        return any(type(value) is type(v) and value == v for v in values)

    return accepts


def _number(*values: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value in values


def _empty(value: Any) -> bool:
    return value in ([], {}, "") and not isinstance(value, bool)


_NO_TOOLS = "tools are not served"

# (field, accepts(value) for a value that changes nothing, what is supported)
UNSUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("best_of", _number(1), "no answer is thrown away: use n"),
    ("use_beam_search", _one_of(False), "sampling is the only method"),
    ("tools", _empty, _NO_TOOLS),
    ("tool_choice", _one_of("none", "auto"), _NO_TOOLS),
    ("functions", _empty, _NO_TOOLS),
    ("function_call", _one_of("none", "auto"), _NO_TOOLS),
    ("guided_grammar", _empty, "use structured_outputs.grammar"),
    ("structural_tag", _empty, "use structured_outputs"),
    ("bad_words", _empty, "use logit_bias"),
    ("allowed_token_ids", _empty, "use logit_bias"),
    ("suffix", _empty, "text is only continued, not filled in"),
    ("modalities", lambda value: value == ["text"], "text is the only modality"),
    ("audio", _empty, "text is the only modality"),
    ("web_search_options", _empty, "the web is not searched"),
    ("reasoning_effort", _one_of("none"), "the model does not reason before it answers"),
    ("store", _one_of(False), "answers are not stored"),
    ("continue_final_message", _one_of(False), "an answer is always a new message"),
    ("add_generation_prompt", _one_of(True), "an answer is always a new message"),
    ("chat_template", _empty, "the model's own template is used"),
    ("chat_template_kwargs", _empty, "the model's own template is used"),
)
UNSUPPORTED_IN_CHAT: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("echo", _one_of(False), "only a completion repeats its prompt"),
)
