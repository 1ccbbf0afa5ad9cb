"""Dictionaries of known, low coherence: unit-norm atoms as rows, (atoms, features), float64.

============================= ==================== ================= ======================
frame                         features             atoms             coherence μ
============================= ==================== ================= ======================
`identity_hadamard(n)`        n, a power of 2      2n                1/√n
`paley(q)`                    (q + 1)/2            q + 1             1/√q
`steiner(v)`                  v(v − 1)/2           v²                1/(v − 1)
`sparse_pairs(n, μ)`          n, even              n, of 2 non-zeros μ, any in [0, 1)
`sparse_lines(n, k, atoms)`   n                    at most (n/k)²    1/k, k the non-zeros
============================= ==================== ================= ======================

The first three have about the least coherence there can be (equiangular frames, the second and third, exactly the
least), the last two are for the deeper layers of a chain: they keep what they synthesize sparse. Sources: Donoho and
Huo 2001; Strohmer and Heath 2003; Fickus, Mixon and Tremain 2012; DeVore 2007 (lines over a finite field).
"""

import math

import torch
from scipy.linalg import hadamard
from torch import Tensor


def identity_hadamard(features: int) -> Tensor:
    """The unit vectors, and beside them the Hadamard basis. Raises ValueError unless n is a power of 2 above 1."""
    return torch.cat([torch.eye(features, dtype=torch.float64), _hadamard(features) / math.sqrt(features)])


def paley(prime: int) -> Tensor:
    """Equiangular frame of Paley's conference matrix C: its Gram matrix is ``I + C/√q``.

    C has χ(i − j) off its diagonal, the quadratic character modulo q, and a border of ones.
    Raises ValueError unless q is a prime with q mod 4 = 1.
    """
    if not (prime % 4 == 1 and _is_prime(prime)):
        near = min((q for q in range(5, 2 * abs(prime) + 6, 4) if _is_prime(q)), key=lambda q: abs(q - prime))
        raise ValueError(f"paley needs a prime q with q mod 4 = 1, got {prime}; the nearest is {near}")
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1
    character[0] = 0
    index = torch.arange(prime)
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = character[(index.unsqueeze(1) - index) % prime]
    # Its eigenvalues are ±√q, half of them each: I + C/√q is twice the projection on the upper half.
    return math.sqrt(2) * torch.linalg.eigh(conference).eigenvectors[:, (prime + 1) // 2 :]


def steiner(points: int) -> Tensor:
    """Equiangular frame of the pairs of v points: atoms of one point are a simplex on the v − 1 pairs that hold it.

    Raises ValueError unless v is a power of 2 above 1.
    """
    simplex = _hadamard(points)[:, 1:] / math.sqrt(points - 1)
    pairs = torch.combinations(torch.arange(points))
    frame = torch.zeros(points, points, len(pairs), dtype=torch.float64)
    for point in range(points):
        frame[point][:, (pairs == point).any(1)] = simplex
    return frame.flatten(0, 1)


def sparse_pairs(
    features: int, coherence: float, nonneg: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """As many atoms as features, two on each of n/2 random pairs of features, with cosine ±μ; μ = 0 is orthonormal.

    With `nonneg` no entry is below 0. Raises ValueError for odd n or μ outside [0, 1).
    """
    if features < 2 or features % 2:
        raise ValueError(
            f"pairs need an even number of features, got {features}; the nearest is {max(2, features + 1)}"
        )
    if not 0 <= coherence < 1:
        raise ValueError(f"coherence must lie in [0, 1), got {coherence}")
    pairs = features // 2
    angle, span = torch.rand(pairs, dtype=torch.float64, generator=generator), math.acos(coherence)
    # Both atoms of a pair in the first quadrant, or anywhere.
    first = angle * ((math.pi / 2 - span) if nonneg else 2 * math.pi)
    angles = torch.stack([first, first + span])
    place = torch.randperm(features, generator=generator).view(pairs, 2)
    atoms = torch.zeros(2, pairs, features, dtype=torch.float64)
    atoms[:, torch.arange(pairs), place[:, 0]] = angles.cos()
    atoms[:, torch.arange(pairs), place[:, 1]] = angles.sin()
    return atoms.flatten(0, 1)


def sparse_lines(features: int, nonzeros: int, atoms: int, generator: torch.Generator | None = None) -> Tensor:
    """Random lines ``{(x, ax + b mod q): x < k}`` as indicators over √k, with q the largest prime up to n/k.

    Two lines meet in one point at most. Features beyond kq are used by no atom.
    Raises ValueError where k exceeds q, or for more atoms than the q² lines.
    """
    prime = next((q for q in range(features // max(nonzeros, 1), 1, -1) if _is_prime(q)), 0)
    if not 1 <= nonzeros <= prime:
        least = next(q for q in range(max(nonzeros, 2), 2 * abs(nonzeros) + 3) if _is_prime(q))
        raise ValueError(
            f"lines of {nonzeros} points, at least one, need at least {abs(nonzeros) * least} features, got {features}"
        )
    if not 1 <= atoms <= prime**2:
        raise ValueError(f"{features} features have {prime**2} lines of {nonzeros} points, got {atoms} atoms")
    lines = torch.randperm(prime**2, generator=generator)[:atoms].unsqueeze(1)
    x = torch.arange(nonzeros)
    points = x * prime + (lines // prime * x + lines) % prime
    return torch.zeros(atoms, features, dtype=torch.float64).scatter_(1, points, 1 / math.sqrt(nonzeros))


def shuffled(atoms: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The atoms in random order with random signs, which leave every coherence as it is."""
    order = torch.randperm(len(atoms), generator=generator)
    signs = torch.randint(2, (len(atoms), 1), generator=generator) * 2 - 1
    return atoms[order] * signs


def _hadamard(size: int) -> Tensor:
    if size < 2 or size & (size - 1):
        near = 2 ** max(1, round(math.log2(max(size, 2))))
        raise ValueError(f"a Hadamard matrix is made here for powers of 2 above 1, got {size}; the nearest is {near}")
    return torch.from_numpy(hadamard(size, dtype="float64"))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
