"""Types and helpers shared by the sample kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

Exchange = tuple[str, str]  # one prompt and its reply
Conversation = list[Exchange]
Kind = Callable[[Random, int], list[Conversation]]

# Name, subject pronoun, possessive.
PEOPLE: list[tuple[str, str, str]] = [
    ("Amara", "she", "her"),
    ("Ben", "he", "his"),
    ("Chloe", "she", "her"),
    ("Diego", "he", "his"),
    ("Elif", "she", "her"),
    ("Farid", "he", "his"),
    ("Grace", "she", "her"),
    ("Hugo", "he", "his"),
    ("Ines", "she", "her"),
    ("Jonas", "he", "his"),
    ("Kavya", "she", "her"),
    ("Leo", "he", "his"),
    ("Mina", "she", "her"),
    ("Nils", "he", "his"),
    ("Olga", "she", "her"),
    ("Pablo", "he", "his"),
]
NAMES = [name for name, _, _ in PEOPLE]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def cycle_distinct(rng: Random, count: int, makers: Sequence[Callable[[Random], Exchange]]) -> list[Exchange]:
    """Take `count` exchanges from `makers` in turn; a maker that repeats a prompt draws again."""
    seen: set[str] = set()
    exchanges: list[Exchange] = []
    while len(exchanges) < count:
        maker = makers[len(exchanges) % len(makers)]
        for _ in range(1000):
            prompt, reply = maker(rng)
            if prompt not in seen:
                break
        else:
            raise ValueError(f"{maker.__name__} has no further prompts")
        seen.add(prompt)
        exchanges.append((prompt, reply))
    return exchanges


def single(exchanges: Sequence[Exchange]) -> list[Conversation]:
    """Make each exchange a conversation of its own."""
    return [[exchange] for exchange in exchanges]


def capitalised(text: str) -> str:
    """Upper-case the first letter and leave the rest."""
    return text[:1].upper() + text[1:]
