"""Sampling settings that are taken and refused, and the seeds of items."""

import pytest

from perigee.errors import InvalidArgumentError
from perigee.rollout.v1.rollout_pb2 import RepetitionStop, Sampling
from services.rollout.segment import check_repetition_stop, check_sampling, segment_seed


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
        check_sampling(Sampling(temperature=1, **{field: value}), trained_on=trained_on)  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [f"sampling.{field}"]


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_sampling(Sampling(temperature=0, top_p=0.5, top_k=3), trained_on=True)
    assert [violation.field for violation in caught.value.violations] == [
        "sampling.top_p",
        "sampling.top_k",
        "sampling.temperature",
    ]


def test_neutral_values_are_taken() -> None:
    neutral = Sampling(
        temperature=1,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
    )
    check_sampling(neutral, trained_on=True)
    check_sampling(Sampling(temperature=0), trained_on=False)


@pytest.mark.parametrize("temperature", [-1.0, 0.005, 11.0, float("nan"), float("inf")])
@pytest.mark.parametrize("trained_on", [True, False])
def test_temperatures_out_of_range_are_refused(temperature: float, trained_on: bool) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sampling\.temperature"):
        check_sampling(Sampling(temperature=temperature), trained_on=trained_on)


def test_seeds_differ_by_item_and_offset_and_repeat() -> None:
    sampling = Sampling(temperature=1, seed=7)
    seeds = [segment_seed(sampling, item, offset) for item in ("a", "b") for offset in (0, 32)]
    assert len(set(seeds)) == 4
    assert seeds == [segment_seed(sampling, item, offset) for item in ("a", "b") for offset in (0, 32)]
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert segment_seed(Sampling(temperature=1), "a", 0) is None


@pytest.mark.parametrize(("max_period", "min_repeats"), [(0, 3), (5000, 3), (4, 1)])
def test_repetition_rules_that_make_no_sense_are_refused(max_period: int, min_repeats: int) -> None:
    with pytest.raises(InvalidArgumentError, match="repetition_stop"):
        check_repetition_stop(RepetitionStop(max_period=max_period, min_repeats=min_repeats))


def test_no_repeats_turns_the_stop_off() -> None:
    check_repetition_stop(RepetitionStop())
