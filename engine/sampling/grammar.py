"""The form that an answer must have, as one text that the sampler's matcher understands: a grammar of llguidance.

No torch and no numpy here: the HTTP process writes grammars and checks that they compile; engine/sampling/matcher.py
runs them in the worker.
"""

import json
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from engine.errors import GrammarError

GRAMMAR_CHARS_MAX = 65_536  # a larger one is refused before anything looks at it
# No free white space between the parts of JSON: a small model would go on with it for ever. Words of a schema that are
# not understood are an error, never ignored.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "lenient": False}


def limits() -> LLParserLimits:
    """What compiling a grammar, and then each mask, may cost; beyond it the grammar or the sequence fails."""
    return LLParserLimits(
        initial_lexer_fuel=200_000, max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False
    )


def of_schema(schema: dict[str, Any]) -> str:
    """JSON of this schema."""
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def of_regex(regex: str) -> str:
    return LLMatcher.grammar_from_regex(regex)


def of_choice(choices: list[str]) -> str:
    """One of these texts."""
    return LLMatcher.grammar_from_regex("|".join(map(_literally, choices)))


def of_lark(lark: str) -> str:
    """A grammar in llguidance's dialect of Lark."""
    return LLMatcher.grammar_from_lark(lark)


def check(grammar: str) -> None:
    """Raises GrammarError where it does not compile, or is too large to try."""
    if len(grammar) > GRAMMAR_CHARS_MAX:
        raise GrammarError(f"it is over the limit of {GRAMMAR_CHARS_MAX} characters")
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if is_error:
        raise GrammarError(" ".join(messages[0].split())[:300])


def _literally(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)
