"""Judges dialogues: the submission and the caller's interactor, each in a box of its own, on two pipes."""

from __future__ import annotations

from dataclasses import replace

from services.sandbox.attendants import BoxFailedError
from services.sandbox.box.orders import Outcome
from services.sandbox.checker_protocol import Decision, read_decision
from services.sandbox.execute import read_execution, read_output
from services.sandbox.jobs import CompileReport, InputFile, InteractiveTest, Submission, TestOutcome, Verdict
from services.sandbox.judge_stdio import CHECKER_FILES, compiler_words, decide, open_checker, read_outcome
from services.sandbox.pairs import Pair, pipes
from services.sandbox.pool import Slot
from services.sandbox.programs import LoadedProgram, Streams, explain, open_program, opened
from services.sandbox.slots import Opener


async def judge_interactive(
    opener: Opener, submission: Submission, slot: Slot
) -> tuple[list[TestOutcome], CompileReport | None]:
    """The outcome of each dialogue, up to the first failure when that is asked for."""
    assert submission.interactor is not None
    results: list[TestOutcome] = []
    async with open_program(opener, submission.program, slot.program) as loaded:
        if not await loaded.load():
            return [], loaded.compile_report
        async with open_checker(opener, submission.interactor, slot.judge) as interactor:
            for test in submission.tests:
                assert isinstance(test, InteractiveTest)
                results.append(await hold_dialogue(loaded, interactor, test))
                if loaded.compile_report is not None and not loaded.compile_report.ok:
                    return [], loaded.compile_report
                if submission.stop_at_first_failure and results[-1].verdict is not Verdict.ACCEPTED:
                    break
    return results, loaded.compile_report


async def hold_dialogue(loaded: LoadedProgram, interactor: LoadedProgram, test: InteractiveTest) -> TestOutcome:
    """The outcome of one dialogue."""
    contents = (test.input, b"", test.answer)
    files = [InputFile(name, content) for name, content in zip(CHECKER_FILES, contents, strict=True)]
    with opened(b"", b"", b"") as (errors, notes, nothing):
        with pipes() as ends:
            pair = Pair(
                loaded.box,
                loaded.run(Streams(ends.to_program, ends.from_program, errors)),
                interactor.box,
                interactor.run(Streams(ends.to_judge, ends.from_judge, notes), CHECKER_FILES, files),
            )
            await pair.begin()
        (outcome, _), (decided, _), program_first = await pair.finish()
        if interactor.compile_report is not None and not interactor.compile_report.ok:
            raise BoxFailedError(f"the interactor does not compile: {compiler_words(interactor)}")
        execution = read_execution(outcome, Streams(nothing, nothing, errors), loaded.program.limits)
        message, _ = read_output(notes, interactor.program.limits.output_bytes)
    decision = read_decision(
        -1 if decided.exit_code is None else decided.exit_code,
        decided.signal,
        message,
        explain(decided, interactor.program.limits),
    )
    return sum_up_dialogue(read_outcome(execution), outcome, decision, program_first)


def sum_up_dialogue(outcome: TestOutcome, ended: Outcome, decision: Decision, program_first: bool) -> TestOutcome:
    """The verdict of a dialogue.

    A submission that passes a limit has failed, whatever the interactor made of its silence; one that crashes has, too,
    unless the interactor had decided before. Otherwise the interactor decides.
    """
    if ended.stop in ("wall", "cpu", "memory", "output"):
        return outcome
    if outcome.verdict is Verdict.RUNTIME_ERROR and program_first and ended.stop is None:
        return outcome
    return decide(replace(outcome, reason=""), decision)
