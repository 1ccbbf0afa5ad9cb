"""Coordinate descent for ℓ1 on working sets that grow, compiled by numba: one signal at a time, in its core's cache.

What batched tensor operations cannot do: each signal goes its own way. `dsc.active_set` takes it where numba is
installed. After Friedman et al. (glmnet, 2010), Johnson and Guestrin (Blitz, 2015) and Massias et al. (Celer, 2018).
"""

from typing import Any

import numpy as np
from numba import njit

MOST_MEMBERS = 256  # of a working set
LANES = 32  # entries, of which loops over a working set take a multiple: rests of vectors are slow
ENTRANTS, NEARLY = 16, 0.5  # at most so many enter at a time, those whose move is at least that part of the largest
CLOSER = 0.1  # than the largest move of all: how well a working set is solved before others enter
LEAST_PIVOT = 1e-4  # of a factor whose step is taken
ROUNDS, PASSES = 100, 50  # of entrants, and over the working set in each

Array = np.ndarray[Any, Any]
compiled = njit(nogil=True, fastmath=True, cache=True)


@compiled
def minimiser(u: Any, l1: Any, inverse: Any, nonneg: bool) -> Any:
    """``argmin_v ½v² − uv + l1|v| + ½ridge v²``, over v ≥ 0 if `nonneg`; `inverse` is 1/(1 + ridge)."""
    zero = u - u  # of the same precision, as literals are not
    v = max(u - l1, zero)
    if not nonneg:
        v += min(u + l1, zero)
    return v * inverse


@compiled
def find_moves(z: Array, c: Array, l1: Array, inverse: Array, nonneg: bool, moves: Array) -> Any:
    """How far each entry alone would move, into `moves`; returns the largest size."""
    largest = c[0] - c[0]
    for i in range(len(c)):
        moves[i] = minimiser(c[i] + z[i], l1[i], inverse[i], nonneg) - z[i]
        largest = max(largest, abs(moves[i]))
    return largest


@compiled
def enter(moves: Array, least: Any, z: Array, members: Array, count: int) -> int:
    """Append to the first `count` members entries that are zero and move by `least`; returns the new count."""
    end = min(count + ENTRANTS, len(members))
    for i in range(len(z)):
        if count == end:
            break
        if z[i] == 0 and abs(moves[i]) >= least:
            members[count] = i
            count += 1
    return count


@compiled
def shift(z: Array, c: Array, i: int, value: Any, products: Array) -> None:
    """Set entry i of the code, and correct the correlations."""
    move = value - z[i]
    z[i] = value
    if move != 0:
        for j in range(len(c)):
            c[j] -= move * products[j]


@compiled
def gather(
    members: Array, known: int, z: Array, c: Array, l1: Array, inverse: Array, gram: Array, own: Array, block: Array
) -> None:
    """Code, correlations and weights of the members into the rows of `own`; products with unknown ones into `block`."""
    for a in range(len(members)):
        i = members[a]
        own[0, a], own[1, a], own[2, a], own[3, a] = z[i], c[i], l1[i], inverse[i]
    for a in range(known, len(members)):
        products = gram[members[a]]
        for b in range(len(members)):
            block[a, b] = block[b, a] = products[members[b]]


@compiled
def settle(own: Array, count: int, nonneg: bool, gram: Array, goal: Any) -> None:
    """Cycles of coordinate descent, in place, until none moves by more than `goal`; see `gather`."""
    z, c, l1, inverse = own[0], own[1], own[2], own[3]
    width = (count + LANES - 1) // LANES * LANES
    for _ in range(PASSES):
        largest = goal - goal
        for a in range(count):
            move = minimiser(c[a] + z[a], l1[a], inverse[a], nonneg) - z[a]
            if move != 0:
                z[a] += move
                largest = max(largest, abs(move))
                for b in range(width):
                    c[b] -= move * gram[a, b]
        if largest <= goal:
            break


@compiled
def polish(own: Array, count: int, gram: Array, factor: Array, step: Array) -> bool:
    """Newton's step, exact while signs stay; whether it was taken: they did, and the atoms are independent."""
    z, c, l1, inverse = own[0], own[1], own[2], own[3]
    for a in range(count):  # Cholesky
        pivot = gram[a, a] + 1 / inverse[a] - 1
        for b in range(a):
            value = gram[a, b]
            for i in range(b):
                value -= factor[a, i] * factor[b, i]
            factor[a, b] = value / factor[b, b]
            pivot -= factor[a, b] ** 2
        if pivot < LEAST_PIVOT:
            return False
        factor[a, a] = np.sqrt(pivot)
    for a in range(count):
        step[a] = c[a] - l1[a] * np.sign(z[a]) - (1 / inverse[a] - 1) * z[a]
        for i in range(a):
            step[a] -= factor[a, i] * step[i]
        step[a] /= factor[a, a]
    for a in range(count - 1, -1, -1):
        step[a] /= factor[a, a]
        for i in range(a):
            step[i] -= factor[a, i] * step[a]
        if z[a] * (z[a] + step[a]) <= 0:
            return False
    for a in range(count):
        z[a] += step[a]
    return True


@compiled
def keep_support(z: Array, members: Array, gram: Array) -> int:
    """Move the members whose code `z` is not zero, with their products, to the front; returns how many."""
    kept = 0
    for a in range(len(z)):
        if z[a] != 0:
            if kept < a:
                members[kept] = members[a]
                for b in range(len(z)):
                    gram[kept, b] = gram[a, b]
                for b in range(len(z)):
                    gram[b, kept] = gram[b, a]
            kept += 1
    return kept


@compiled
def descend(
    codes: Array, correlations: Array, gram: Array, l1: Array, inverse: Array, nonneg: bool, tolerance: float
) -> None:
    """Bring codes z (signals, entries), in place, to where no entry alone would move by more than `tolerance`.

    `correlations` are ``Dᵀ(x − Dz)``, kept so in place; `gram` is DᵀD with a diagonal of ones (or zeros); `l1` and
    `inverse`, of ridges as 1/(1 + ridge), have a value an entry. Signals that need more members, or
    whose members depend on one another, may end before: the caller looks.
    """
    goal, nearly, closer = l1.dtype.type(tolerance), l1.dtype.type(NEARLY), l1.dtype.type(CLOSER)
    moves, members = np.empty_like(l1), np.empty(min(len(gram), MOST_MEMBERS), np.int64)
    factor, step = np.empty((MOST_MEMBERS, MOST_MEMBERS), gram.dtype), np.empty(MOST_MEMBERS, gram.dtype)
    block, own = np.zeros((MOST_MEMBERS, MOST_MEMBERS), gram.dtype), np.zeros((4, MOST_MEMBERS), gram.dtype)
    for s in range(len(codes)):
        z, c = codes[s], correlations[s]
        count, known = 0, 0
        for i in range(len(z)):
            if z[i] != 0 and count < len(members):
                members[count] = i
                count += 1
        before, polished, settled = goal, False, False
        for _ in range(ROUNDS):
            largest = find_moves(z, c, l1, inverse, nonneg, moves)
            if largest <= goal and (polished or settled):
                break
            settled = largest <= goal  # a last step makes it exact
            if not settled:
                count = enter(moves, nearly * largest, z, members, count)
            if polished and count == known and 2 * largest > before:
                break
            before = largest
            gather(members[:count], known, z, c, l1, inverse, gram, own, block)
            polished = count == known and polish(own, count, block, factor, step)
            if not polished:
                settle(own, count, nonneg, block, max(goal, closer * largest))
            for a in range(count):
                shift(z, c, members[a], own[0, a], gram[members[a]])
            count = known = keep_support(own[0, :count], members, block)
