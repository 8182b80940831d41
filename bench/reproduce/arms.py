"""The arms of the ablations: what each changes in its recipe, and which supervised model it starts from."""

from __future__ import annotations

from dataclasses import dataclass

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe of this folder with overrides.

    It begins with the model and the problem sets of the `warmup` of its seed; an arm without one is such a warm-up.
    """

    name: str
    changes: tuple[str, ...] = ()
    recipe: str = "recipe.yaml"
    warmup: str | None = "warmup"


# The base: every prompt alike, partial rollouts whose older segments stay in the loss, no length reward.
BASE = Arm("base")
CURRICULUM = Arm("curriculum", ("run.curriculum={kind: hard_after_warmup, iterations: 8, end_difficulty: 6}",))
REST = Arm("rest", ("run.algorithm={name: rest}",))
PRIORITIZED = Arm("prioritized", ("run.prioritized.enabled=true",))
LENGTH_REWARD = Arm("length_reward", ("run.length_reward={weight: 0.3, start_iteration: 9}",))
WHOLE_ROLLOUTS = Arm("whole_rollouts", ("run.rollout.token_budget=0",))
MASKED = Arm("masked", ("run.update.max_staleness=0",))

ARMS = {
    arm.name: arm
    for arm in (
        Arm("warmup", recipe="warmup.yaml", warmup=None),
        BASE,
        CURRICULUM,
        REST,
        PRIORITIZED,
        LENGTH_REWARD,
        WHOLE_ROLLOUTS,
        MASKED,
    )
}
