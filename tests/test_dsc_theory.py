"""Each verdict turns when its figure does."""

import json

import pytest

from dsc import cli
from dsc.reproduce import dsc_theory

STABLE = dict(models=2, distances=4, above_the_bound=0, largest_ratios=[0.9, 1.0], most_nonzeros=4)
RATE = dict(
    noisy=False, above_the_bound=0, checked=9, false_positives=0, r_squared=0.995, measured_rate=0.505,
    predicted_rate=0.5, last_error=1e-13,
)  # fmt: skip
EXACT = dict(network="CNN, relu", options={}, error=1e-11, error_float32=1e-6, bound=0.0)
SOFTMAX = dict(network="transformer", options={"temperature": 10.0}, error=1e-3, error_float32=1e-3, bound=1e-2)


def holds(claims):
    return [claim.holds for claim in claims]


def test_all_hold():
    assert holds(dsc_theory.of_stability([STABLE])) == [True, True]
    assert holds(dsc_theory.of_rates([RATE])) == [True] * 5
    assert holds(dsc_theory.of_networks([EXACT, SOFTMAX], {"gelu": {"slope": -1.0}})) == [True] * 3


@pytest.mark.parametrize("number, change", [(0, dict(above_the_bound=1)), (1, dict(most_nonzeros=3))])
def test_stability_fails(number, change):
    assert [i for i, ok in enumerate(holds(dsc_theory.of_stability([STABLE | change]))) if not ok] == [number]


@pytest.mark.parametrize(
    "number, change",
    enumerate([
        dict(above_the_bound=1), dict(r_squared=0.98), dict(measured_rate=0.52), dict(last_error=1e-11),
        dict(false_positives=1),
    ]),
)  # fmt: skip
def test_rates_fail(number, change):
    assert [i for i, ok in enumerate(holds(dsc_theory.of_rates([RATE, RATE | change]))) if not ok] == [number]


def test_noise_has_no_exact_end():
    assert all(holds(dsc_theory.of_rates([RATE, RATE | dict(noisy=True, last_error=1e-7)])))


@pytest.mark.parametrize(
    "exact, softmax, slope, wrong",
    [
        (dict(error=1e-9), {}, -1, 0),
        (dict(error_float32=1e-4), {}, -1, 0),
        ({}, {}, -0.9, 1),
        ({}, dict(error=2e-2), -1, 2),
    ],
)
def test_networks_fail(exact, softmax, slope, wrong):
    found = holds(dsc_theory.of_networks([EXACT | exact, SOFTMAX | softmax], {"gelu": {"slope": slope}}))
    assert [i for i, ok in enumerate(found) if not ok] == [wrong]


@pytest.mark.slow
def test_every_claim_holds_in_the_small_instance(tmp_path):
    cli.main(["reproduce", "dsc_theory", "--fast", "--out", str(tmp_path)])
    claims = json.loads((tmp_path / "dsc_theory.json").read_text())["claims"]
    assert len(claims) > 15 and all(claim["holds"] for claim in claims)
    assert {path.name for path in tmp_path.glob("*.png")} == {"dsc_theory.png", "dsc_theory_networks.png"}
