"""Patches: the response's diff against the tests of a repository, in the sandbox service."""

from __future__ import annotations

import re
from typing import ClassVar

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2 as sandbox_pb
from services.reward.verifiers.base import Item, Outcome, read_answer
from services.reward.verifiers.code import MAX_REASON_CHARACTERS, WRONG_VERDICTS, SandboxVerifier

# A fence within a diff is behind the sign of its line.
FENCE = re.compile(r"^```[A-Za-z0-9_+#-]*[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


def find_patch(text: str) -> str:
    """Returns the last fenced block, also one that does not end; the text when it has none."""
    patch = next(reversed(FENCE.findall(text)), text).lstrip("\n")
    return patch if patch.endswith("\n") else f"{patch}\n"  # a blank line at its end may be one of the file


class PatchVerifier(SandboxVerifier[pb.PatchVerifier]):
    """Correct when the patch makes the tests pass that must; the patch is what follows the marker, of text with fenced
    blocks the last block. A patch that does not apply is wrong.
    """

    name: ClassVar[str] = "patch"
    version: ClassVar[str] = "1"

    def find_violations(self, parameters: pb.PatchVerifier) -> list[FieldViolation]:
        violations = []
        task = parameters.task
        if not task.language:
            violations.append(FieldViolation("patch.task.language", 'is required: "python-test" for one'))
        if task.patch:
            violations.append(FieldViolation("patch.task.patch", "must be empty: the response brings it"))
        if not task.fail_to_pass and not task.pass_to_pass:
            violations.append(FieldViolation("patch.task.fail_to_pass", "or pass_to_pass must name a test"))
        return violations

    async def judge(self, item: Item[pb.PatchVerifier]) -> Outcome:
        text = read_answer(item)
        if isinstance(text, Outcome):
            return text
        patch = find_patch(text)
        if not patch.strip():
            return Outcome.ungradable("the patch is empty")
        request = sandbox_pb.JudgePatchRequest()
        request.CopyFrom(item.parameters.task)
        request.patch = patch.encode(errors="replace")

        def read(response: sandbox_pb.JudgePatchResponse) -> Outcome | str:
            reason = response.reason[:MAX_REASON_CHARACTERS]
            if response.verdict == sandbox_pb.TEST_VERDICT_ACCEPTED:
                return Outcome.correct(patch)
            if response.verdict == sandbox_pb.TEST_VERDICT_UNJUDGEABLE:
                return self.leave_out(item, reason, patch)
            if response.verdict in WRONG_VERDICTS:
                return Outcome.wrong(patch, f"{WRONG_VERDICTS[response.verdict]}: {reason}")
            return reason

        def refused(error: InvalidArgumentError) -> Outcome:
            if error.violations and all(violation.field == "patch" for violation in error.violations):
                return Outcome.ungradable(f"the sandbox refuses the patch: {error.message}", patch)
            return Outcome.failed(
                f"the sandbox refuses the prompt's repository: {error.message}", retryable=False, extracted=patch
            )

        return await self.ask(
            lambda timeout_s: self.sandbox.judge_patch(request, timeout_s=timeout_s), read, refused, patch
        )
