"""Judges dialogues: the submission and the caller's interactor, each in a box of its own, on two pipes."""

from __future__ import annotations

from dataclasses import replace

from services.sandbox.attendants import BoxFailedError
from services.sandbox.checker_protocol import Decision, read_decision
from services.sandbox.execute import read_execution, read_output
from services.sandbox.jobs import CompileReport, InputFile, InteractiveTest, Submission, TestOutcome, Verdict
from services.sandbox.judge_stdio import CHECKER_FILES, compiler_words, decide, open_checker, read_outcome
from services.sandbox.pairs import Pair
from services.sandbox.pool import Slot
from services.sandbox.programs import LoadedProgram, Streams, explain, open_program, opened
from services.sandbox.relay import JUDGE, PROGRAM, Dialogue, carrying
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
    most = (loaded.program.limits.output_bytes, interactor.program.limits.output_bytes)
    with opened(b"", b"", b"") as (errors, notes, nothing):
        async with carrying(*most) as (ends, dialogue):
            pair = Pair(
                loaded.box,
                loaded.run(Streams(ends.program_stdin, ends.program_stdout, errors)),
                interactor.box,
                interactor.run(Streams(ends.judge_stdin, ends.judge_stdout, notes), CHECKER_FILES, files),
            )
            await pair.begin()
            ends.close()
            (outcome, _), (decided, _), program_first = await pair.finish()
        if interactor.compile_report is not None and not interactor.compile_report.ok:
            raise BoxFailedError(f"the interactor does not compile: {compiler_words(interactor)}")
        if PROGRAM in dialogue.too_much and outcome.stop in (None, "told"):
            outcome = replace(outcome, stop="output")
        execution = read_execution(outcome, Streams(nothing, nothing, errors), loaded.program.limits)
        message, _ = read_output(notes, interactor.program.limits.output_bytes)
    limit = explain(decided, interactor.program.limits)
    if JUDGE in dialogue.too_much:
        limit = f"output limit of {interactor.program.limits.output_bytes} bytes"
    exit_code = -1 if decided.exit_code is None else decided.exit_code
    decision = read_decision(exit_code, decided.signal, message, limit)
    known = read_outcome(execution)
    crashed = known.verdict is Verdict.RUNTIME_ERROR and program_first
    if crashed or outcome.stop in ("wall", "cpu", "memory", "output"):
        return known
    return decide_dialogue(known, decision, dialogue)


def decide_dialogue(known: TestOutcome, decision: Decision, dialogue: Dialogue) -> TestOutcome:
    """The verdict of a dialogue in which the submission has neither passed a limit nor crashed: the interactor's.

    One that fails because the submission had left before has not failed: the submission has.
    """
    if decision.verdict is Verdict.INFRA_ERROR and dialogue.program_left_first:
        reason = f"the submission left before the dialogue was over; {decision.message}"
        return replace(known, verdict=Verdict.WRONG_ANSWER, reason=reason)
    return decide(replace(known, reason=""), decision)
