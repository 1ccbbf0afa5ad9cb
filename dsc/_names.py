"""How every wrong name is answered: the value, the nearest valid choice, and all valid choices."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Message for a name that is not among `choices`: it names the value, the nearest choice and all of them."""
    known = sorted(choices)
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"
