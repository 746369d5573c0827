"""What a judge's answer says: the probability of yes in its first token, or a number in its text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibri_lightning.errors import UserError
from calibri_lightning.remote.errors import sanitised
from calibri_lightning.remote.wire import WireError
from calibri_lightning.remote.wires.replies import kind, mapping, number, told

_MOST_TEXT = 1 << 16
_UNLIKELY = -9999.0
"""What the API says for a token that is not among the likely ones."""
# How tokenizers write the blank before a word when they do not decode it: SentencePiece and byte-level BPE.
_BLANKS = " \t\r\n\u2581\u0120\u010a"
_TOLERANCE = 1e-2
"""What rounding may add to a sum of probabilities."""


@dataclass(frozen=True)
class NumberRule:
    """Where a number stands in a text, and which ones are answers.

    Attributes:
        pattern: Its first group is the number.
        low: The smallest.
        high: The largest.
    """

    pattern: re.Pattern[str]
    low: float
    high: float

    @classmethod
    def checked(cls, pattern: str, low: float, high: float) -> NumberRule:
        """Makes a rule of options.

        Args:
            pattern: A regular expression.
            low: The smallest number.
            high: The largest number.

        Returns:
            The rule.

        Raises:
            UserError: If the expression is none or has no group, or there is nothing between the numbers.
        """
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"The option pattern {pattern!r} is no regular expression: {error}. Correct it.") from error
        if compiled.groups < 1:
            raise UserError(f"The option pattern {pattern!r} has no group; put the number into (...).")
        ends = (low, high)
        if any(isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end) for end in ends):
            raise UserError(f"The options low and high are {low!r} and {high!r}; they must be finite numbers.")
        if low >= high:
            raise UserError(f"The options low and high are {low} and {high}; low must be below high.")
        return cls(compiled, float(low), float(high))


def chosen(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Reads the likely first tokens of an answer.

    Args:
        choice: An entry of `choices` in a chat completion.

    Returns:
        Tokens and their log-probabilities.

    Raises:
        WireError: If there are none, or they are no probabilities.
    """
    logprobs = choice.get("logprobs")
    content = mapping(logprobs, "logprobs").get("content") if logprobs is not None else None
    if not isinstance(content, list) or not content:
        raise WireError(
            "the reply has no log-probabilities. The server must give them for chat completions, 20 a token; with one "
            "that does not, ask for a number (score: number)"
        )
    listed = mapping(content[0], "logprobs.content[0]").get("top_logprobs")
    if not isinstance(listed, list):
        raise WireError(f"top_logprobs is {kind(listed)}; the rule is a list of tokens")
    tokens = [_token(mapping(entry, "a token of top_logprobs")) for entry in listed]
    if sum(math.exp(logprob) for _, logprob in tokens) > 1 + _TOLERANCE:
        raise WireError("the probabilities in top_logprobs sum up to more than 1")
    return tokens


def probability_of_yes(tokens: Sequence[tuple[str, float]], alone: bool) -> tuple[float, str]:
    """Reads how sure a model is.

    Every way to write a word counts: with capitals or not, with a blank before it or not. They are tokens of their own,
    even where two of them are the same text once decoded, so their probabilities add up.

    Args:
        tokens: Tokens and their log-probabilities.
        alone: Whether it is P(yes), or P(yes) / (P(yes) + P(no)).

    Returns:
        The probability and an empty text; or NaN and why, if neither word is among the tokens.
    """
    words = [(token.strip(_BLANKS).lower(), logprob) for token, logprob in tokens]
    yes = _logsumexp([logprob for word, logprob in words if word == "yes"])
    no = _logsumexp([logprob for word, logprob in words if word == "no"])
    if max(yes, no) == -math.inf:
        likeliest = sorted(tokens, key=lambda token: -token[1])[:5]
        seen = ", ".join(repr(sanitised(token)) for token, _ in likeliest) or "none"
        return math.nan, f"neither yes nor no is among the likely first tokens: {seen}"
    if alone:
        return math.exp(min(yes, 0.0)), ""
    # By the difference of logarithms, so that two tiny probabilities keep their ratio (and -inf is no special case).
    return (1 / (1 + math.exp(no - yes)) if no <= yes else math.exp(yes - no) / (1 + math.exp(yes - no))), ""


def written(choice: Mapping[str, Any], rule: NumberRule) -> tuple[float, str]:
    """Reads the number that a model wrote.

    Args:
        choice: An entry of `choices` in a chat completion.
        rule: Where it stands.

    Returns:
        The number of the last match and an empty text; or NaN and why.

    Raises:
        WireError: If the answer has no text.
    """
    text = mapping(choice.get("message"), "message").get("content")
    if not isinstance(text, str):
        raise WireError(f"the content of the message is {kind(text)}; the rule is a text")
    matches = list(rule.pattern.finditer(text[-_MOST_TEXT:]))
    if not matches:
        cut = " The answer was cut: raise max_tokens." if choice.get("finish_reason") == "length" else ""
        return math.nan, f"no score in the answer, which ends with {sanitised(text[-100:])!r}.{cut}"
    try:
        value = float(matches[-1].group(1))
    # The group may have matched no digits, or nothing at all.
    except (TypeError, ValueError):
        return math.nan, f"no number: {told(matches[-1].group(1))!r}"
    if not rule.low <= value <= rule.high:
        return math.nan, f"{value} is not within {rule.low}..{rule.high}"
    return value, ""


def _token(entry: Mapping[str, Any]) -> tuple[str, float]:
    token, logprob = entry.get("token"), entry.get("logprob")
    if not isinstance(token, str):
        raise WireError(f"a token of top_logprobs is {kind(token)}; the rule is a text")
    # JSON has no -Infinity; null stands for it in some servers.
    value = -math.inf if logprob is None else number(logprob, "a log-probability")
    if value > _TOLERANCE:
        raise WireError(f"a log-probability is {value}; the rule is 0 or less")
    return token, -math.inf if value <= _UNLIKELY else value


def _logsumexp(values: Sequence[float]) -> float:
    most = max(values, default=-math.inf)
    return most if most == -math.inf else most + math.log(sum(math.exp(value - most) for value in values))
