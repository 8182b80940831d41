"""The arms of the ablations: what each changes in its recipe, and which supervised model it starts from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from perigee.config import read_yaml

RECIPES = Path(__file__).parent
SEEDS = (0, 1, 2)
# The base alone, and mirror descent against ReST, which lie near one another, on more.
MORE_SEEDS = (0, 1, 2, 3, 4)
# The keys of long2short.yaml were chosen on seed 0.
SHORTENING_SEEDS = (1, 2, 3)
# The seed on which learning rates are chosen; no other figure shows it.
RATE_SEED = 9


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe of this folder with overrides of its `run`.

    It begins with the model and the problem sets of the `warmup` of its seed; an arm without one is such a warm-up.
    """

    name: str
    changes: tuple[str, ...] = ()
    recipe: str = "recipe.yaml"
    warmup: str = "warmup"
    sources: tuple[str, ...] = ()
    """Other arms whose models it is made of."""

    @property
    def settings(self) -> str:
        """What tells its results from those of other settings, those of its warm-up and its sources included."""
        warmup = ARMS[self.warmup].settings if self.warmup else ""
        sources = [ARMS[name].settings for name in self.sources]
        return digest([read_yaml(RECIPES / self.recipe), self.changes, warmup, *sources])


def digest(value: object) -> str:
    """Returns a short name of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


# The base: every prompt alike, partial rollouts whose older segments stay in the loss, no length reward.
BASE = Arm("base")
CURRICULUM = Arm("curriculum", ("run.curriculum={kind: hard_after_warmup, iterations: 6, end_difficulty: 6}",))
REST = Arm("rest", ("run.algorithm={name: rest}",))
PRIORITIZED = Arm("prioritized", ("run.prioritized.enabled=true",))
LENGTH_REWARD = Arm("length_reward", ("run.length_reward={weight: 0.3, start_iteration: 7}",))
WHOLE_ROLLOUTS = Arm("whole_rollouts", ("run.rollout.token_budget=0",))
MASKED = Arm("masked", ("run.update.max_staleness=0",))
LARGE = Arm("large", warmup="warmup_large")


def at_rate(arm: Arm, name: str, rate: float) -> Arm:
    """Returns an arm that differs from another in its learning rate."""
    return Arm(name, (*arm.changes, f"run.optimizer.learning_rate={rate:.1e}"))


# The report's equation, in which the sum over a response is not divided: the pull to the opening policy is 50 times
# as strong against the rewards.
UNSCALED = Arm("unscaled", ("run.update.token_scale=1.0",))

# Each algorithm by learning rate, in rising order; the rate of the recipe is 1e-4.
BY_RATE = {
    label: {rate: arm if rate == 1e-4 else at_rate(arm, f"{name}_{rate:.0e}", rate) for rate in rates}
    for label, name, arm, rates in (
        ("ReST", "rest", REST, (1e-4, 3e-4, 1e-3)),
        ("mirror descent", "mirror_descent", BASE, (3e-5, 1e-4, 3e-4, 1e-3)),
        ("mirror descent, unscaled", "unscaled", UNSCALED, (3e-4,)),
    )
}

# Trained by `perigee reward train` on the judge's examples, as often and with the same rate.
VALUE_HEAD = Arm(
    "value_head",
    ("batch_size=32", "max_tokens=128", "learning_rate=0.001", "loss=pointwise", "threads=1"),
    "judges.yaml",
    "judge",
)

# Figure 7: what `perigee long2short` compares, from the models of the recipes long and short, both of one warm-up.
EXAMPLE = "../../examples/arithmetic"
LONG_TO_SHORT = tuple(
    Arm(f"long2short_{model}", recipe=f"{EXAMPLE}/long2short.yaml", warmup="long", sources=("short",))
    for model in ("long", "short", "merge", "rejection", "dpo", "rl")
)

ARMS = {
    arm.name: arm
    for arm in (
        Arm("warmup", recipe="warmup.yaml", warmup=""),
        Arm("warmup_large", ('model="{data}/model-large"',), "warmup.yaml", ""),
        Arm("judge", recipe="judges.yaml", warmup=""),
        VALUE_HEAD,
        Arm("warmup_styles", recipe=f"{EXAMPLE}/warmup.yaml", warmup=""),
        Arm("long", recipe=f"{EXAMPLE}/long.yaml", warmup="warmup_styles"),
        Arm("short", recipe=f"{EXAMPLE}/short.yaml", warmup="warmup_styles"),
        *LONG_TO_SHORT,
        *(arm for arms in BY_RATE.values() for arm in arms.values()),
        CURRICULUM,
        PRIORITIZED,
        LENGTH_REWARD,
        WHOLE_ROLLOUTS,
        MASKED,
        LARGE,
    )
}
