"""Seeded mutations of bytes and of JSON-like trees, and what may come of reading them."""

from __future__ import annotations

import copy
import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from trainer.errors import UserError

T = TypeVar("T")
SECONDS = 20.0  # of CPU time for one input: a hundred times what any needs, so a slow machine is no hang
NUMBERS = (0, -1, 1, 2, 7, 255, 2**31, 2**63, -(2**63), 2**64, 10**30, 1e308, -1e308, 1e-320, 0.5, float("nan"))
ODD: tuple[Any, ...] = (
    *NUMBERS,
    *(float("inf"), float("-inf"), True, False, None, "", " ", "x", "1", "1e400", "\x00", "a\nb", "\u2028", "\ud800"),
    *("../../etc/passwd", "/dev/zero", "é" * 40, "9" * 5000, "${oc.env:HOME}", "???", "x" * 100_000),
    *([], {}, [[]], [None], [0], [-1], [[0, 1], [1]], ["a"], {"a": 1}, {"": {}}, [[[[[[[[0]]]]]]]]),
)
SNIPPETS = tuple(
    text.encode()
    for text in ("[", "]", "{", "}", ":", ",", '"', "\n", "\x00", "&a ", "*a", "!!int ", "<<: ", "${x}", "nan", "- ")
)


def amount(count: int) -> pytest.MarkDecorator:
    """Run a test with so many inputs, and, marked slow, with ten times as many."""
    more = pytest.param(10 * count, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
    return pytest.mark.parametrize("count", [count, more])


def settled(read: Callable[[], T], names: str, refusal: type[Exception] = UserError) -> T | None:
    """What was read, or None where it was refused in one line that `names` the file; anything else fails the test."""
    began = time.process_time()
    try:
        return read()
    except refusal as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and names in text, text
        assert len(text) < 2000, "a message that nobody would read"
        return None
    finally:
        assert time.process_time() - began < SECONDS


def byte_mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flipped, cut, repeated, overwritten and spliced copies, most of them with one change, some with several."""
    rng = random.Random(seed)
    yield from (b"", b"\x00", data[: len(data) // 2], data + data, bytes(len(data)), rng.randbytes(len(data)))
    for _ in range(count - 6):
        mutant = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
            _change(mutant, rng)
        yield bytes(mutant)


def _change(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 100, 600)))
    kind = rng.randrange(7)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at:end] = rng.randbytes(end - at)
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end]
    elif kind == 4:
        data[at:at] = rng.choice(SNIPPETS)
    elif kind == 5:
        data[at:end] = bytes([rng.choice((0, 0x20, 0x30, 0x39, 0x7F, 0x80, 0xFF))]) * (end - at)
    else:
        del data[at : end if rng.random() < 0.8 else len(data)]


def tree_mutants(tree: Any, count: int, seed: int, odd: Sequence[Any] = ODD) -> Iterator[Any]:
    """Copies of nested dicts and lists with one to three places replaced, removed, repeated, renamed or nested."""
    rng = random.Random(seed)
    for _ in range(count):
        mutant = [copy.deepcopy(tree)]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _change_tree(mutant, rng, odd)
        yield mutant[0]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything below a node."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield node, key
        yield from _places(value)


def _change_tree(root: list[Any], rng: random.Random, odd: Sequence[Any]) -> None:
    places = list(_places(root))
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 4 or holder is root:
        holder[key] = copy.deepcopy(rng.choice(odd))
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        source, other = rng.choice(places)  # a part of the same tree, somewhere else
        value = source[other] if isinstance(source, list) or other in source else None
        holder[key] = copy.deepcopy(value)
    elif kind == 6 and isinstance(holder, dict):
        noise = "".join(rng.sample(string.printable, 9))
        name = rng.choice(("", "x", "schema", "name", "a\nb", f"{key}s", noise))
        holder[name] = holder.pop(key) if rng.random() < 0.5 else rng.choice(odd)
    else:
        value: Any = holder[key]
        for _ in range(rng.choice((1, 2, 40))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        holder[key] = value
