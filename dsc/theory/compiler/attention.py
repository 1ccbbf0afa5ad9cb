"""An iteration as self-attention: the entries of a signal and the atoms of a dictionary are the tokens.

Every token holds a value (x of an entry, z of an atom) and its position, one-hot. Queries and keys see the position
alone: the key of an entry is a unit vector, that of an atom is the atom, and its query is s times the atom; the value
read is x − z. So softmax-free attention adds ``s Σ_p d_ip x_p − s Σ_j ⟨d_i, d_j⟩ z_j``, which is ``sDᵀ(x − Dz)``, to
each atom's z. What shrinks the sum u is

- "attention": ReLU behind each attention, of coordinates ``u − θ`` and ``−u − θ``, which a second head mixes (by it
  each token attends to itself alone);
- "transformer": a feed-forward with a residual, of units that shrink u and units that take u away.

With softmax, two heads of logits ±S/T stand for a head of scores S: with N tokens, whose logits add up to zero, their
difference times NT/2 is ``S v + O(1/T²)``. That they do is the task of one token more, whose key is minus the sum of
all others and whose value is 0. Rounding grows like T, so the error has a minimum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsc.theory.compiler.iteration import Iteration

HARD = 1e4  # logit by which a token attends to itself alone: exp(−HARD) is 0


@dataclass(frozen=True)
class Head:
    """Scores ``queries @ keysᵀ`` by position, (tokens, dim) each; `values` (read, width) and `output` (width, read)."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor


class Attention(nn.Module):
    """``x + Σ_h A_h x V_hᵀ O_hᵀ`` with ``A_h = Q_h K_hᵀ``, or its softmax; tokens (batch, tokens, width).

    Queries and keys read the last coordinates of a token, its position.
    """

    def __init__(self, heads: list[Head], softmax: bool) -> None:
        super().__init__()
        self.heads, self.softmax = len(heads), softmax
        width, positions = len(heads[0].output), len(heads[0].keys)
        dim, read = max(h.keys.shape[1] for h in heads), max(len(h.values) for h in heads)
        wide = (width - positions, 0, 0, dim)
        self.query = _linear(torch.cat([F.pad(h.queries.mT, wide)[:dim] for h in heads]))
        self.key = _linear(torch.cat([F.pad(h.keys.mT, wide)[:dim] for h in heads]))
        self.value = _linear(torch.cat([F.pad(h.values, (0, 0, 0, read))[:read] for h in heads]))
        self.output = _linear(torch.cat([F.pad(h.output, (0, read))[:, :read] for h in heads], 1))

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return x + self.output((self.weights(x) @ value).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """How much each token takes from each other, (batch, heads, tokens, tokens)."""
        query, key = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key))
        scores = query @ key.mT
        return scores.softmax(-1) if self.softmax else scores


class TransformerBlock(nn.Module):
    """An attention step, then ``x + FFN(x)`` with one hidden layer of ReLU; tokens (batch, tokens, width)."""

    def __init__(self, attention: Attention, hidden: Tensor, output: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = nn.Sequential(_linear(hidden), nn.ReLU(), _linear(output))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.feed_forward(x)


class Tokens(nn.Module):
    """Signals (batch, features) to tokens (batch, tokens, width): entries by a linear map, others 0, and a position."""

    def __init__(self, embedding: Tensor, features: int, tokens: int) -> None:
        super().__init__()
        self.others = tokens - features
        self.embed = _linear(F.pad(embedding, (0, tokens)).unsqueeze(1))
        self.position = nn.Parameter(F.pad(torch.eye(tokens).double(), (len(embedding), 0)))

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.embed(x.unsqueeze(-1)), (0, 0, 0, self.others)) + self.position


class Codes(nn.Module):
    """A linear map of each atom's token: (batch, tokens, width) to (batch, atoms)."""

    def __init__(self, weights: Tensor, width: int, first: int, atoms: int) -> None:
        super().__init__()
        self.read = _linear(F.pad(weights, (0, width - len(weights))).unsqueeze(0))
        self.first, self.atoms = first, atoms

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(tokens[:, self.first : self.first + self.atoms]).squeeze(-1)


def stack(one: Iteration, kind: str, temperature: float | None) -> list[nn.Module]:
    """The modules of one dense iteration, "attention" or "transformer"; the blocks of its steps are one and the same.

    Raises ValueError for momentum, groups, or an elastic net with λ per channel.
    """
    if any(one.momentum):
        raise ValueError('momentum compiles to="cnn": attention takes ISTA')
    if one.shrinkage.group is not None:
        raise ValueError('group shrinkage is approximated to="cnn" alone')
    if (one.shrinkage.gain != one.shrinkage.gain[0]).any():
        raise ValueError('an elastic net with λ per channel compiles to="cnn": tokens share one gain')
    atoms, features = one.weight.shape
    tokens = atoms + features + (temperature is not None)
    steps = len(one.momentum) + 1
    build = _attention if kind == "attention" else _transformer
    embedding, blocks, reading = build(one, tokens, temperature)
    modules: list[nn.Module] = [Tokens(embedding, features, tokens)]
    if kind == "attention":
        modules.append(nn.ReLU())  # x as max(x, 0) and max(−x, 0)
    return [*modules, *blocks * steps, Codes(reading, len(embedding) + tokens, features, atoms)]


def _attention(one: Iteration, tokens: int, temperature: float | None) -> tuple[Tensor, list[nn.Module], Tensor]:
    # Coordinates: x⁺, x⁻, and of the last u those above θ and, unless z ≥ 0, below −θ: z = gain (h⁺ − h⁻).
    signs = _vector(1) if one.shrinkage.nonneg else _vector(1, -1)
    gain = one.shrinkage.gain[0]
    reading = torch.cat([_vector(0, 0), gain * signs])
    width = len(reading) + tokens
    values = F.pad(torch.cat([_vector(1, -1), -gain * signs]), (0, tokens)).unsqueeze(0)
    output = F.pad(torch.cat([_vector(0, 0), signs]), (0, tokens)).unsqueeze(1)
    # The residual has h: this head makes it ±z − θ, and the others add ±sDᵀ(x − Dz).
    mixing = gain * signs.unsqueeze(1) * signs - torch.eye(len(signs)).double()
    levels = _levels(one, signs, tokens)
    own = torch.cat([torch.zeros(len(signs), 2).double(), mixing, levels], 1)
    place = torch.zeros(width, len(signs)).double()
    place[2 : len(reading)] = torch.eye(len(signs))
    identity = torch.eye(tokens).double()
    itself = Head(identity if temperature is None else HARD * identity, identity, own, place)
    heads = [*_gradient(one, tokens, temperature, values, output), itself]
    blocks = [Attention(heads, temperature is not None), nn.ReLU()]
    return F.pad(_vector(1, -1), (0, len(signs))), blocks, reading


def _transformer(one: Iteration, tokens: int, temperature: float | None) -> tuple[Tensor, list[nn.Module], Tensor]:
    # Coordinates: x, z.
    values, output = F.pad(_vector(1, -1), (0, tokens)).unsqueeze(0), F.pad(_vector(0, 1), (0, tokens)).unsqueeze(1)
    signs = _vector(1) if one.shrinkage.nonneg else _vector(1, -1)
    both = _vector(1, -1)
    levels = torch.cat([_levels(one, signs, tokens), torch.zeros(2, tokens).double()])
    hidden = torch.cat([torch.zeros(len(levels), 1).double(), torch.cat([signs, both]).unsqueeze(1), levels], 1)
    weights = torch.cat([one.shrinkage.gain[0] * signs, -both])
    attention = Attention(_gradient(one, tokens, temperature, values, output), temperature is not None)
    return _vector(1, 0), [TransformerBlock(attention, hidden, output * weights)], _vector(0, 1)


def _gradient(one: Iteration, tokens: int, temperature: float | None, values: Tensor, output: Tensor) -> list[Head]:
    # Heads that give sDᵀ(x − Dz) to the atoms and nothing to the others.
    features = one.weight.shape[1]
    keys = torch.cat([torch.eye(features).double(), one.weight])
    queries = F.pad(one.step * one.weight, (0, 0, features, 0))
    if temperature is None:
        return [Head(queries, keys, values, output)]
    keys, queries = torch.cat([keys, -keys.sum(0, keepdim=True)]), F.pad(queries, (0, 0, 0, 1))
    size = tokens * temperature / 2
    return [Head(sign * queries / temperature, keys, values, sign * size * output) for sign in (1, -1)]


def _levels(one: Iteration, signs: Tensor, tokens: int) -> Tensor:
    # ±sb − θ of each atom, by its position; 0 for other tokens, whose z is and stays 0.
    atoms, features = one.weight.shape
    levels = signs.unsqueeze(1) * one.shift - one.shrinkage.threshold
    return F.pad(levels, (features, tokens - atoms - features))


def softmax_errors(attention: Attention, one: Iteration, temperature: float) -> tuple[float, float]:
    """Norms of the errors with which softmax gives ``sDᵀ`` and ``sDᵀD``: of its weights, and of rounding their sums."""
    atoms, features = one.weight.shape
    weight = attention.query.weight
    tokens = atoms + features + 1
    position = F.pad(torch.eye(tokens), (weight.shape[1] - tokens, 0)).to(weight)
    with torch.no_grad():
        up, down = attention.weights(position.unsqueeze(0))[0, :2, features : features + atoms].double().cpu()
    scores = tokens * temperature / 2 * (up - down)
    drive = one.step * one.weight
    errors = scores[:, :features] - drive, scores[:, features : features + atoms] - drive @ one.weight.mT
    rounding = torch.finfo(weight.dtype).eps * temperature * tokens * atoms**0.5
    first, second = (float(torch.linalg.matrix_norm(error, 2)) + rounding for error in errors)
    return first, second


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight)
    return made


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
