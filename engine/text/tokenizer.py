"""Text to token ids and back, without torch: the HTTP process counts prompt tokens with this, the worker decodes with
it.

Reads tokenizer.json (the `tokenizers` library), tokenizer_config.json, chat_template.jinja, config.json and
generation_config.json of a model folder. Chat templates come with the model, so they run in jinja2's immutable sandbox.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ConfigError, TokenizerError
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.spellings import Hidden, Spellings

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how SentencePiece models spell single bytes
_SPACE = "\u2581"  # and how they spell spaces

# Messages, or tools, as transformers hands them to a template: JSON values, what a call passes as an object.
Messages = list[dict[str, Any]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises ConfigError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the model folder has no {path.name}: {path}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


class Tokenizer:
    """Build with `load`. ``model_id`` is the name in config.json, else the folder's name."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | None,
        special_tokens: dict[str, str],
        eos_token_ids: frozenset[int],
        context_max: int,
        model_id: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = _compile(chat_template) if chat_template is not None else None
        self._special_tokens = special_tokens
        self.eos_token_ids = eos_token_ids
        self.context_max = context_max
        self.model_id = model_id
        added = tokenizer.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self._spellings = Spellings(token.content for token in added.values() if token.special)
        self._byte_level = tokenizer.decoder is not None and b'"ByteLevel"' in tokenizer.decoder.__getstate__()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Raises ConfigError where a file is missing or malformed."""
        config = read_json(folder / "config.json")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"the model folder has no tokenizer.json: {path}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception on malformed files
            raise ConfigError(f"{path} cannot be read: {error}") from error
        extra = _read_optional(folder / "tokenizer_config.json")
        template_path = folder / "chat_template.jinja"
        template = template_path.read_text(encoding="utf-8") if template_path.is_file() else extra.get("chat_template")
        context_max = config.get("max_position_embeddings")
        if not isinstance(context_max, int) or context_max <= 0:
            raise ConfigError(f"{folder / 'config.json'}: max_position_embeddings must be a positive whole number")
        return cls(
            tokenizer,
            chat_template=template if isinstance(template, str) else None,
            special_tokens=_special_tokens(extra),
            eos_token_ids=_eos_token_ids(tokenizer, config, _read_optional(folder / "generation_config.json"), extra),
            context_max=context_max,
            model_id=str(config.get("bulkhead_model_id") or folder.name),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the model's post-processor adds, if any."""
        return list(self._tokenizer.encode(text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """`encode`, and the characters of ``text`` before each token: where its own text begins, or for a part of a
        character, where that does. A token without text of its own is where the one before it ends."""
        encoding = self._tokenizer.encode(text)
        offsets, end = [], 0
        for begin, own_end in encoding.offsets:
            offsets.append(min(begin, end) if own_end > begin else end)
            end = max(end, own_end)
        return list(encoding.ids), offsets

    def offsets_in_text(self, token_ids: Sequence[int]) -> list[int]:
        """The same for token ids, in the text that `decode` makes of them."""
        detokenizer, offsets = IncrementalDetokenizer(self.decode), []
        for token_id in token_ids:
            detokenizer.push(token_id)
            offsets.append(detokenizer.begin)
        return offsets

    def encode_chat(self, messages: Messages, tools: Messages | None = None) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins. What is spelled like a special token
        inside a message or a tool is text (engine/text/spellings.py).

        Raises TokenizerError where the template refuses the messages or the model has none.
        """
        text, hidden = self._render(messages, tools)
        return hidden.encode(text, lambda part: list(self._tokenizer.encode(part, add_special_tokens=False).ids))

    def render_chat(self, messages: Messages, tools: Messages | None = None) -> str:
        """The conversation as the text that encode_chat tokenises. Raises TokenizerError."""
        text, hidden = self._render(messages, tools)
        return hidden.show(text)

    def _render(self, messages: Messages, tools: Messages | None) -> tuple[str, Hidden]:
        if self._template is None:
            raise TokenizerError(f"the model {self.model_id} has no chat template")
        marked, told, hidden = self._spellings.hide(messages, tools)
        try:
            text = self._template.render(
                messages=marked, tools=told, add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise TokenizerError(f"the chat template refused the messages: {error}") from error
        return text, hidden

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give no text, unfinished characters give U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, whether or not they are whole characters; b"" for an id without a token.

        Special tokens stand for their own spelling.
        """
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        spelling: str | None = self._tokenizer.id_to_token(token_id)
        if spelling is None:
            return b""
        if self._byte_level:
            return bytes(BYTE_OF_LETTER[letter] for letter in spelling if letter in BYTE_OF_LETTER)
        if _BYTE_TOKEN.fullmatch(spelling):
            return bytes([int(spelling[3:5], 16)])
        return spelling.replace(_SPACE, " ").encode()

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))


def _byte_of_letter() -> dict[str, int]:
    """How byte-level tokenizers spell bytes (GPT-2's table): printable ones as themselves, the others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ConfigError(f"the model's chat template does not compile: {error}") from error


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(extra: dict[str, Any]) -> dict[str, str]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {name: text for name in names if (text := _token_text(extra.get(name))) is not None}


def _eos_token_ids(
    tokenizer: tokenizers.Tokenizer, config: dict[str, Any], generation: dict[str, Any], extra: dict[str, Any]
) -> frozenset[int]:
    """Every id that ends an answer: generation_config.json's, else config.json's, and the tokenizer's own."""
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = {value} if isinstance(value, int) else set(value or ())
    text = _token_text(extra.get("eos_token"))
    token_id = tokenizer.token_to_id(text) if text is not None else None
    return frozenset(ids if token_id is None else ids | {token_id})
