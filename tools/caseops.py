"""CaseOps: a lossless transform that writes capitals as operators before small letters.

    The NASA iPhone  ->  {TITLE}the {CAPS}nasa i{NEXT}phone

Operators are four private-use characters; one that stands in the text itself is written after an
escape. Only ASCII letters are transformed. `restore` is the inverse of `transform`, and
`token_raw_bytes` says how many bytes of the original text every token of a transformed one stands
for: operators count nothing, and nothing else changes its length.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence

import numpy as np

if typing.TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

TITLE, CAPS, NEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"

_TO_TRANSFORM = re.compile(f"[A-Za-z]+|[{OPERATORS}]")
_TO_RESTORE = re.compile(f"{ESCAPE}(.)|{CAPS}([a-z]+)|[{TITLE}{NEXT}]([a-z])", re.DOTALL)


def _write(match: re.Match[str]) -> str:
    word = match[0]
    if word in OPERATORS:
        return ESCAPE + word
    if word.islower():
        return word
    if len(word) > 1 and word.isupper():
        return CAPS + word.lower()
    first = TITLE + word[0].lower() if word[0].isupper() else word[0]
    return first + re.sub("[A-Z]", lambda letter: NEXT + letter[0].lower(), word[1:])


def transform(text: str) -> str:
    """The text without ASCII capitals."""
    return _TO_TRANSFORM.sub(_write, text)


def restore(text: str) -> str:
    """The text whose transform is given."""
    return _TO_RESTORE.sub(lambda m: m[1] or (m[2] or m[3]).upper(), text)


def raw_bytes(transformed: str) -> np.ndarray:
    """UTF-8 bytes of the original text that each character of a transformed one stands for."""
    code = np.frombuffer(transformed.encode("utf-32-le"), dtype="<u4")
    size = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    for start in re.finditer(f"{ESCAPE}.|[{OPERATORS}]", transformed, re.DOTALL):
        size[start.start()] = 0
    return size


def token_ends(tokenizer: SentencePieceProcessor, text: str) -> list[int]:
    """Where in a text its tokens end, in characters."""
    try:
        found: typing.Any = tokenizer.encode(text, out_type="offset_mapping")
        return [stop for _, stop in found["offsets"]]
    except (RuntimeError, ValueError, TypeError):  # SentencePiece before 0.2.2 has another name
        found = tokenizer.encode(text, out_type="immutable_proto")  # type: ignore[arg-type]
        return [piece.end for piece in found.pieces]


def token_raw_bytes(transformed: str, ends: Sequence[int]) -> np.ndarray:
    """Bytes of the original text for each token, given where in the transformed text tokens end.
    What the tokenizer leaves out, such as a second space, counts for the token that follows, and
    at the end for the last one: the sum is the length of the original text."""
    total = np.concatenate([[0], np.cumsum(raw_bytes(transformed))])
    stops = total[list(ends)]
    stops[-1:] = total[-1]
    return np.diff(stops, prepend=0)
