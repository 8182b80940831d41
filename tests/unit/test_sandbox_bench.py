"""The figures that the sandbox's benchmark derives from what it measured."""

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sandbox_accuracy import Accuracy
from sandbox_bare import find_groups, open_spawner
from sandbox_bundle import NAMESPACES, make_bundle
from sandbox_figures import Arm, growth_of, largest_accepted, percentile, ratio_of, relative_error, worst
from sandbox_gateway import Gateway
from sandbox_soak import Latency, Sample, Soak
from sandbox_start import TARGETS, Starts, take_turns
from sandbox_throughput import Load, Throughput

SAMPLES = st.lists(st.floats(min_value=0, max_value=1e6), min_size=1)


@given(SAMPLES, st.floats(min_value=0.01, max_value=1))
def test_a_percentile_is_not_exceeded_by_its_share_of_the_samples(samples: list[float], fraction: float) -> None:
    found = percentile(samples, fraction)
    assert found in samples
    assert sum(sample <= found for sample in samples) >= fraction * len(samples)
    assert sum(sample < found for sample in samples) < fraction * len(samples)


def test_percentiles_of_a_known_list() -> None:
    assert percentile(list(range(1, 101)), 0.95) == 95
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([3.0, 1.0, 2.0], 1.0) == 3.0


def test_ratio_of_medians_and_the_spread_of_its_turns() -> None:
    left, right = Arm("left", [[1.0, 2.0, 9.0], [4.0, 4.0, 4.0]]), Arm("right", [[1.0, 1.0, 1.0], [8.0, 8.0, 8.0]])
    ratio = ratio_of(left, right)
    assert (left.median, right.median) == (4.0, 4.5)
    assert ratio.median == pytest.approx(4.0 / 4.5)
    assert (ratio.least, ratio.largest) == (0.5, 2.0)
    with pytest.raises(ValueError, match="zip"):
        ratio_of(left, Arm("short", [[1.0]]))


def test_errors_keep_their_sign() -> None:
    assert relative_error(105, 100) == pytest.approx(0.05)
    assert relative_error(90, 100) == pytest.approx(-0.10)
    assert worst([0.02, -0.07, 0.05]) == -0.07
    accuracy = Accuracy("memory", [100.0, 200.0], [101.0, 190.0])
    assert accuracy.errors == pytest.approx([0.01, -0.05])
    assert accuracy.worst == pytest.approx(-0.05)


def test_growth_tells_a_leak_from_noise() -> None:
    leak = growth_of([0, 1000, 2000, 3000], [10.0, 12.0, 14.0, 16.0])
    assert (leak.first, leak.middle, leak.last, leak.change) == (10.0, 14.0, 16.0, 6.0)
    assert leak.per_thousand == pytest.approx(2.0)
    noise = growth_of([0, 1000, 2000], [5.0, 9.0, 5.0])
    assert (noise.change, noise.per_thousand) == (0.0, pytest.approx(0.0))
    with pytest.raises(ValueError, match="two samples"):
        growth_of([0], [1.0])


@given(st.integers(100, 9_999), st.integers(1, 500))
def test_bisection_finds_the_limit_to_its_resolution(limit: int, resolution: int) -> None:
    asked: list[int] = []

    def accepts(number: int) -> bool:
        asked.append(number)
        return number <= limit

    found = largest_accepted(accepts, 100, 10_000, resolution)
    assert limit - resolution < found <= limit
    assert len(asked) <= 3 + math.log2(10_000)


def test_bisection_says_when_its_bounds_are_wrong() -> None:
    with pytest.raises(ValueError, match="10 is refused already"):
        largest_accepted(lambda number: number < 5, 10, 20, 1)
    with pytest.raises(ValueError, match="20 is still accepted"):
        largest_accepted(lambda number: number < 50, 10, 20, 1)


async def test_alternatives_take_turns_start_by_start() -> None:
    calls: list[tuple[str, int]] = []

    def arm(name: str, time_ms: float) -> tuple[str, object]:
        async def measure(count: int) -> list[float]:
            calls.append((name, count))
            return [time_ms + index for index in range(count)]

        return name, measure

    names = ("bare python", "zygote python", "crun lean", "other")
    measures = dict(arm(name, 10.0 * index) for index, name in enumerate(names))
    arms = await take_turns(measures, turns=2, block=3)  # type: ignore[arg-type]
    turn = [(name, 1) for name in names] * 3 + [(name, 4) for name in names[:3]]
    assert calls == turn * 2
    assert arms["other"].turns == [[30.0] * 3] * 2
    assert arms["crun lean, back to back"].turns == [[21.0, 22.0, 23.0]] * 2  # the first of a block does not count


def test_start_ratios_are_those_of_the_targets() -> None:
    medians = {
        "bare python": 20.0,
        "zygote python": 5.0,
        "crun python": 40.0,
        "crun lean": 13.0,
        "bare crun true": 10.0,
    }
    starts = Starts("bash", {name: Arm(name, [[median]]) for name, median in medians.items()})
    ratios = {name: ratio.median for name, ratio in starts.ratios().items()}
    assert ratios == {"zygote / bare python": 0.25, "zygote / crun python": 0.125, "crun lean / bare crun": 1.3}
    assert ratios.keys() == TARGETS.keys()


def test_throughput_is_per_core_and_names_the_clients_share() -> None:
    loads = [Load(100, 1.0, 0.5), Load(240, 2.0, 0.5), Load(900, 3.0, 0.5)]
    result = Throughput("zygote python", 2, loads)
    assert result.per_core(2) == statistics.median([100, 120, 300]) / 2
    assert result.client_share(2) == pytest.approx(1.5 / 6.0 / 2)


def test_soak_grows_from_its_first_sample_to_its_last() -> None:
    samples = [Sample(jobs, 50.0 + jobs / 1000, 30.0, 5, 90, 28, 12, 100, 6) for jobs in (0, 1000, 2000)]
    latencies = [Latency(1000, 4.0, 9.0), Latency(2000, 5.0, 9.0)]
    growths = Soak(2000, 10.0, samples, latencies, []).growths()
    assert growths["service_rss_mib"].per_thousand == pytest.approx(1.0)
    assert growths["median_ms"].change == pytest.approx(1.0)
    assert {name for name, growth in growths.items() if growth.change} == {"service_rss_mib", "median_ms"}


def test_gateway_costs_the_difference_of_medians() -> None:
    gateway = Gateway(Arm("http", [[5.0, 6.0, 70.0]]), Arm("grpc", [[4.0, 4.5, 5.0]]))
    assert gateway.difference_ms == pytest.approx(1.5)


def mount_line(path: str, kind: str, options: str) -> str:
    """A line of /proc/self/mountinfo."""
    return f"30 23 0:26 / {path} rw,nosuid shared:4 - {kind} {kind} {options}\n"


V1_LINES = mount_line("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct") + mount_line(
    "/sys/fs/cgroup/memory", "cgroup", "rw,memory"
)
V2_LINE = mount_line("/sys/fs/cgroup/unified", "cgroup2", "rw")


@pytest.mark.parametrize(
    ("mountinfo", "groups", "hidden"),
    [
        (V1_LINES, ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory"], []),
        (V1_LINES + V2_LINE, ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory"], ["/sys/fs/cgroup/unified"]),
        (V2_LINE, ["/sys/fs/cgroup/unified"], []),
        (mount_line("/", "ext4", "rw"), [], []),
    ],
    ids=["v1", "hybrid", "v2", "none"],
)
def test_groups_are_made_where_crun_looks(mountinfo: str, groups: list[str], hidden: list[str]) -> None:
    assert find_groups(mountinfo) == ([Path(group) for group in groups], hidden)


def test_the_bare_container_is_as_closed_as_the_sandboxes(tmp_path: Path) -> None:
    make_bundle(tmp_path, ["/bin/true"])
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["root"]["readonly"] is True
    assert config["process"]["noNewPrivileges"] is True
    assert config["process"]["capabilities"] == {}
    assert config["process"]["user"]["uid"] > 1000
    assert {space["type"] for space in config["linux"]["namespaces"]} == set(NAMESPACES)
    assert all("ro" in mount["options"] for mount in config["mounts"] if mount["type"] == "bind")
    assert config["linux"]["seccomp"]["syscalls"]


async def test_the_spawner_times_what_it_starts_and_tells_what_fails() -> None:
    async with open_spawner() as spawner:
        times = await spawner.time(["/bin/true"], 3)
        slow = await spawner.time(["/bin/sleep", "0.2"], 1)
        assert len(times) == 3
        assert all(milliseconds > 0 for milliseconds in times)
        assert slow[0] >= 200
        with pytest.raises(RuntimeError, match="ended with"):
            await spawner.time(["/bin/false"], 1)
        with pytest.raises(RuntimeError, match="No such file"):
            await spawner.time(["/bin/missing"], 1)
        assert len(await spawner.time(["/bin/true"], 1)) == 1
