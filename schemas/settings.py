"""What the dataclasses of the configuration share: fields outside identities, and refusals that name the key."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from schemas.feedback import BITS


def resource(default: Any) -> Any:
    """A field that is no part of any identity."""
    return field(default=default, metadata={"resource": True})


def later(default: Any) -> Any:
    """A field that came when there were results already: at its default it is no part of an identity, so theirs stay."""
    return field(default=default, metadata={"later": True})


def require(condition: bool, key: str, remedy: str) -> None:
    """Raises ValueError, which the loader turns into a sentence with the file's name."""
    if not condition:
        raise ValueError(f"{key} {remedy}")


def check_bits(key: str, names: tuple[str, ...]) -> None:
    for name in names:
        require(name in BITS, key, f"names no feedback bit {name!r}; known: {', '.join(BITS)}")
