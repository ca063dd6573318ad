"""Slurm's short forms: host lists, node[01-03,7]x, and counts per node, 4(x2),3."""

import itertools
import re

_PART = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(text: str) -> list[str]:
    """ "a[01-02],b" to ["a01", "a02", "b"]; several brackets in one name give every combination.

    Raises:
        ValueError: brackets that do not close, or a range that is none.
    """
    hosts: list[str] = []
    for name in re.split(r",(?![^\[]*\])", text.strip()):  # commas outside of brackets
        pieces = _PART.split(name)  # literal, inside, literal, inside, ..., literal
        literals, insides = pieces[::2], pieces[1::2]
        if not name or any("[" in part or "]" in part for part in literals):
            raise ValueError(f"cannot read the host list '{text}': expected a form like node[01-03,7],other")
        for numbers in itertools.product(*(_numbers(inside, text) for inside in insides)):
            hosts.append("".join(itertools.chain(*zip(literals, numbers, strict=False), literals[-1:])))
    return hosts


def _numbers(inside: str, text: str) -> list[str]:
    """ "01-03,7" to ["01", "02", "03", "7"]: a range keeps the digits of its first number."""
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"cannot read the host list '{text}': '{part}' is no number and no rising range")
        first, last = match[1], match[2] or match[1]
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """ "4(x2),3" to [4, 4, 3], the tasks of each node.

    Raises:
        ValueError: anything else.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"cannot read the tasks per node '{text}': expected a form like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
