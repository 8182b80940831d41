"""Sampling settings that are taken and refused, and the seeds of items."""

import pytest

from perigee.errors import InvalidArgumentError
from services.rollout.sampling import SamplingSettings, Truncation, check_sampling, repetition_rule

WHOLE = SamplingSettings(temperature=1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.9),
        ("top_p", 0.0),
        ("top_k", 40),
        ("min_p", 0.05),
        ("repetition_penalty", 1.1),
        ("presence_penalty", -0.5),
        ("frequency_penalty", 0.5),
    ],
)
@pytest.mark.parametrize("trained_on", [True, False])
def test_truncations_and_penalties_are_refused_by_name(field: str, value: float, trained_on: bool) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_sampling(WHOLE, Truncation(**{field: value}), trained_on=trained_on)
    assert [violation.field for violation in caught.value.violations] == [f"sampling.{field}"]


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_sampling(SamplingSettings(temperature=0), Truncation(top_p=0.5, top_k=3), trained_on=True)
    assert [violation.field for violation in caught.value.violations] == [
        "sampling.top_p",
        "sampling.top_k",
        "sampling.temperature",
    ]


def test_neutral_values_are_taken() -> None:
    neutral = Truncation(
        top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
    )
    check_sampling(WHOLE, neutral, trained_on=True)
    check_sampling(SamplingSettings(temperature=0), Truncation(), trained_on=False)


@pytest.mark.parametrize("temperature", [-1.0, 0.005, 11.0, float("nan"), float("inf")])
@pytest.mark.parametrize("trained_on", [True, False])
def test_temperatures_out_of_range_are_refused(temperature: float, trained_on: bool) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sampling\.temperature"):
        check_sampling(SamplingSettings(temperature), Truncation(), trained_on=trained_on)


def test_seeds_differ_by_item_and_offset_and_repeat() -> None:
    settings = SamplingSettings(temperature=1, seed=7)
    seeds = [settings.seed_of(item, offset) for item in ("a", "b") for offset in (0, 32)]
    assert len(set(seeds)) == 4
    assert seeds == [settings.seed_of(item, offset) for item in ("a", "b") for offset in (0, 32)]
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert WHOLE.seed_of("a", 0) is None


@pytest.mark.parametrize(("max_period", "min_repeats"), [(0, 3), (5000, 3), (4, 1)])
def test_repetition_rules_that_make_no_sense_are_refused(max_period: int, min_repeats: int) -> None:
    with pytest.raises(InvalidArgumentError, match="repetition_stop"):
        repetition_rule(max_period, min_repeats)


def test_no_repeats_turns_the_stop_off() -> None:
    assert repetition_rule(0, 0) is None
