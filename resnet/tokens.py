"""Tokens, one per line, as servers and callers have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resnet import BadInput
from resnet.files import read_file


def read_tokens(path: Path) -> Sequence[str]:
    """Return the tokens in a file, at least one.

    Raises:
        BadInput: The file cannot be read, or holds no token.
    """
    return parse_tokens(read_file(path).decode("ascii", "replace"), str(path))


def parse_tokens(text: str, name: str) -> Sequence[str]:
    """Return the tokens in a text, at least one; `name` says in errors where they are.

    Raises:
        BadInput: The text holds no token.
    """
    lines = [line.strip() for line in text.splitlines()]
    tokens = [line for line in lines if line]
    if not tokens or not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise BadInput(f"{name} holds no token: each is one line of printable ASCII without spaces")
    return tokens
