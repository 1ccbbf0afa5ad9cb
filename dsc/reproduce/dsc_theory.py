"""What is claimed of deep sparse coding, each claim checked: stable codes, a linear rate, and networks that compute it.

A row a claim, with the figure it asks for, the one that was found, and whether it holds. `dsc_rate` and `dsc_compiler`
have the details.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from dsc.report import table
from dsc.reproduce import dsc_compiler, dsc_rate
from dsc.reproduce.results import Results

Row = dict[str, Any]
Progress = Callable[[str], None]
EXACT, EXACT_SINGLE = 1e-10, 1e-5  # largest errors of an exact network, for signals of norm 1
REACHED = 1e-12  # error without noise, after the steps that the theory asks for
STRAIGHT = 0.99  # R² of a line through log-errors
SLOPE = 0.05  # how far a fitted power may be from the one claimed


@dataclass(frozen=True)
class Claim:
    """A claim, what it asks for, what was found, and whether that is enough."""

    claim: str
    asked: str
    found: str
    holds: bool


def run(args: Namespace, progress: Progress) -> Results:
    """The checks, `args.seeds` times; of the stability once, whose models are as many as asked."""
    rate = dsc_rate.FAST if args.fast else dsc_rate.Settings()
    compiler = dsc_compiler.FAST if args.fast else dsc_compiler.Settings()
    cases = product(range(args.seeds), rate.rate_frames, dsc_rate.LAYERS, (False, True))
    rates = [dsc_rate.measure_rate(rate, frame, layers, noisy, seed) for seed, frame, layers, noisy in cases]
    progress("rates measured")
    stable = dsc_rate.measure_stability(rate, progress)
    networks = [row for seed in range(args.seeds) for row in dsc_compiler.measure(compiler, seed)]
    progress("networks compiled")
    shrinkage = dsc_compiler.shrinkage_errors(compiler)
    claims = [*of_stability(stable), *of_rates(rates), *of_networks(networks, shrinkage)]
    figures = {
        "settings": {"rate": asdict(rate), "compiler": asdict(compiler)},
        "fast": args.fast,
        "claims": [asdict(claim) for claim in claims],
    }
    lines = [[c.claim, c.asked, c.found, "holds" if c.holds else "fails"] for c in claims]
    picture = dsc_rate.draw([row for row in rates if row["frame"] == rate.rate_frames[0]])
    compiled = dsc_compiler.draw({"networks": networks, "shrinkage": shrinkage})
    return Results(figures, table(["claim", "asked", "found", ""], lines), picture, {"networks": compiled})


def of_stability(rows: list[Row]) -> Iterator[Claim]:
    """Unique and stable codes, of models that satisfy the conditions."""
    models, distances, above = (sum(row[key] for row in rows) for key in ("models", "distances", "above_the_bound"))
    closest = max(max(row["largest_ratios"]) for row in rows)
    found = f"{above} of {distances:,} distances in {models:,} models; the nearest at {closest:.2f} of it"
    yield Claim(
        "two codes of a signal are never farther apart than the stability bound", "0 above it", found, not above
    )
    covered = max(row["most_nonzeros"] for row in rows)
    yield Claim("the conditions cover codes worth having", "4 non-zeros or more", str(covered), covered >= 4)


def of_rates(rows: list[Row]) -> Iterator[Claim]:
    """The linear rate of unrolled layers with the thresholds of the theory."""
    above, checked, wrong = (sum(row[key] for row in rows) for key in ("above_the_bound", "checked", "false_positives"))
    yield Claim("every step is within s·B·ρᵏ + floor", "0 above it", f"{above} of {checked:,}", not above)
    straight = min(row["r_squared"] for row in rows)
    yield Claim("log-errors fall in a straight line", f"R² ≥ {STRAIGHT}", f"{straight:.4f}", straight >= STRAIGHT)
    faster = max(row["measured_rate"] - row["predicted_rate"] for row in rows)
    found = f"{abs(faster):.3f} {'slower' if faster > 0 else 'faster'} at worst"
    yield Claim("the measured factor is the predicted one", f"within {SLOPE / 5:g}", found, faster <= SLOPE / 5)
    last = max(row["last_error"] for row in rows if not row["noisy"])
    yield Claim("without noise the code is reached", f"≤ {REACHED:g}", f"{last:.1e}", last <= REACHED)
    yield Claim("no entry is active that should not be", "0", str(wrong), not wrong)


def of_networks(rows: list[Row], shrinkage: dict[str, Row]) -> Iterator[Claim]:
    """Compiled networks: exact ones, those of smooth activations, and those of softmax."""
    exact = [row for row in rows if "error_float32" in row and "temperature" not in row["options"]]
    for kind in dict.fromkeys(row["network"] for row in exact):
        double, single = (
            max(row[key] for row in exact if row["network"] == kind) for key in ("error", "error_float32")
        )
        asked, holds = f"≤ {EXACT:g}, {EXACT_SINGLE:g} in float32", double <= EXACT and single <= EXACT_SINGLE
        yield Claim(f"the iteration is computed by: {kind}", asked, f"{double:.1e}, {single:.1e}", holds)
    for name, one in shrinkage.items():
        power, holds = one["slope"], abs(one["slope"] + 1) <= SLOPE
        yield Claim(f"{name}: error like 1/R", "slope −1", f"{power:.2f}".replace("-", "−"), holds)
    softmax = [row for row in rows if "temperature" in row["options"]]
    least = min(softmax, key=lambda row: row["error"])
    warm = f"{least['error']:.1e} at T = {least['options']['temperature']:.3g}"
    within = all(row["error"] <= row["bound"] for row in softmax)
    yield Claim("softmax attention is within its bound at every temperature", "all", f"least error {warm}", within)
