"""Figures and comparisons of answers, and what an evaluation that was cut short has left to do."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.eval import model
from perigee.cli.eval.model import Completion, Endpoint, find_model, local_endpoint
from perigee.cli.eval.responses import AnswerStore, Attempt, make_attempts, runs_code
from perigee.cli.eval.results import Length, compare, read_answers, summarize
from perigee.cli.eval.suites import LoadedSuite, SamplingSettings, load_suite
from perigee.errors import InvalidArgumentError, UnavailableError
from perigee.reward.v1 import reward_pb2
from services.kit.process import ChildProcess
from tests.fixtures.chat import TEMPLATE, write_chat_model


def answer(problem: int, attempt: str, verdict: str, **values: Any) -> dict[str, Any]:
    """A line of answers.jsonl."""
    named = {"suite": "s", "id": str(problem), "attempt": attempt, "verdict": verdict}
    return named | {"domain": "d", "answer": verdict, "tokens": 10, "truncated": False} | values


def test_figures() -> None:
    answers = [answer(n, "greedy", "correct" if n < 3 else "wrong", domain="ab"[n % 2]) for n in range(4)]
    answers[0] |= {"tokens": 90, "truncated": True}
    answers += [answer(0, f"sample-{n}", "correct" if n != 2 else "wrong", domain="a") for n in range(3)]
    answers += [answer(1, f"sample-{n}", "correct" if n == 2 else "wrong", domain="b") for n in range(3)]
    answers.append(answer(2, "sample-0", "failed", domain="a", tokens=44, truncated=True))
    figures = summarize(answers)
    assert set(figures) == {"overall", "a", "b"}
    overall = figures["overall"]
    assert overall.greedy is not None
    assert overall.avg_at_k is not None
    assert overall.maj_at_k is not None
    assert overall.pass_at_k is not None
    assert (overall.problems, overall.samples, overall.failures) == (4, 3, 1)
    assert (overall.greedy.mean, overall.avg_at_k.mean) == (0.75, pytest.approx(0.5))
    assert (overall.maj_at_k.mean, overall.pass_at_k.mean) == (0.5, 1.0)
    assert overall.greedy_length == Length(30, 0.25)
    assert overall.sample_length == Length(10, 0)
    assert figures["b"].greedy is not None
    assert figures["b"].greedy.mean == 0.5


def test_a_comparison_pairs_problems() -> None:
    first = [answer(n, "greedy", "correct" if n < 5 else "wrong") for n in range(30)]
    second = [answer(n, "greedy", "correct" if n < 20 else "wrong") for n in range(29)]
    [found] = compare(first, second)
    assert (found.problems, found.only_first, found.only_second) == (29, 0, 15)
    assert found.p == pytest.approx(2 / 2**15)
    assert found.difference.low > 0
    samples = [answer(n, "sample-0", "wrong") for n in range(9)]
    [same] = compare(samples, samples)
    assert (same.test, same.p, same.difference.mean) == ("paired bootstrap over problems", 1.0, 0.0)
    with pytest.raises(InvalidArgumentError, match="no problem in common"):
        compare(first, samples)


@pytest.fixture
def suite(tmp_path: Path) -> LoadedSuite:
    """One problem."""
    (tmp_path / "sums.jsonl").write_text('{"id": "a", "prompt": "1+1=", "verifier": "math", "answer": "2"}\n')
    return load_suite(str(tmp_path / "sums.jsonl"), tmp_path)


def plan(suite: LoadedSuite, **sampling: Any) -> list[Attempt]:
    """The attempts of a suite at some sampling."""
    return make_attempts(suite, SamplingSettings(**sampling), Endpoint("u", "m"), "weights")


def test_an_evaluation_goes_on_and_keeps_what_is_the_same(tmp_path: Path, suite: LoadedSuite) -> None:
    outcomes = {"greedy": buffer_pb2.VERDICT_CORRECT, "sample-0": buffer_pb2.VERDICT_FAILED}
    with AnswerStore(tmp_path / "out", plan(suite, samples=2)) as store:
        assert len(store.missing()) == 3
        for name, verdict in outcomes.items():
            store.hold(f"sums/a/{name}", Completion("2", 1, truncated=False))
            store.add([reward_pb2.ScoreResponse(id=f"sums/a/{name}", verdict=verdict, extracted_answer="2")])
        store.add([reward_pb2.ScoreResponse(id="sums/a/sample-1", verdict=buffer_pb2.VERDICT_FAILED)])
    with AnswerStore(tmp_path / "out", plan(suite, samples=2)) as again:
        assert [attempt.name for attempt in again.missing()] == ["sample-0", "sample-1"]
        # A response that is there waits for its verdict only.
        assert again.completion("sums/a/sample-0") == Completion("2", 1, truncated=False)
        assert again.completion("sums/a/sample-1") is None
    # Another cap is another question.
    with AnswerStore(tmp_path / "out", plan(suite, samples=2, max_tokens=5)) as other:
        assert len(other.missing()) == 3
    # A comparison takes the answers that the last figures are made of.
    for attempts, verdicts in ((again, ["correct", "failed", "failed"]), (other, [])):
        digests = [attempt.digest for attempt in attempts.attempts.values()]
        (tmp_path / "out" / "results.json").write_text(json.dumps({"digests": {"sums": digests}}))
        assert [line["verdict"] for line in read_answers(tmp_path / "out")] == verdicts


def test_a_part_that_is_code_needs_the_sandbox(suite: LoadedSuite) -> None:
    item = reward_pb2.ScoreItem()
    item.composite.parts.add(name="program").verifier.code.function_name = "f"
    assert [runs_code(each) for each in (item, suite.problems[0].line.item)] == [True, False]


def test_requests(suite: LoadedSuite) -> None:
    greedy, first, second = (attempt.body for attempt in plan(suite, samples=2, seed=3))
    assert (greedy["temperature"], greedy["messages"][0]["content"]) == (0.0, "1+1=")
    assert first["seed"] != second["seed"]
    [plain] = make_attempts(suite, SamplingSettings(samples=0), Endpoint("u", "m", chat=False), "")
    assert plain.body["prompt"] == "1+1="


@pytest.mark.parametrize(
    ("template", "text"), [(TEMPLATE, "<bos><turn>user: 1+1=<end><turn>assistant: "), (None, "<bos>1+1=")]
)
def test_a_local_model_is_asked_by_its_template(
    tmp_path: Path, suite: LoadedSuite, template: str | None, text: str
) -> None:
    folder = write_chat_model(tmp_path / "model", template=template)
    endpoint = local_endpoint(folder, chat=True)
    [greedy] = make_attempts(suite, SamplingSettings(samples=0), endpoint, "")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(greedy.body["prompt"], skip_special_tokens=False) == text
    # The context has 256 tokens, the suite's cap is 2,048.
    assert greedy.body["max_tokens"] == 256 - len(greedy.body["prompt"])


def test_a_bare_hub_name_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"neither a folder nor a run here; .* hf://owner/Model-1\.7B"):
        find_model("owner/Model-1.7B", tmp_path)


async def test_the_end_of_the_server_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import http.server, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "server = http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler)\n"
        "server.handle_request()\n"
        "sys.exit('ValueError: out of memory')\n"
    )

    servers: list[ChildProcess] = []

    async def start(name: str, command: list[str], log_path: Path, environment: Any) -> ChildProcess:
        port = command[command.index("--port") + 1]
        servers.append(await ChildProcess.start(name, [sys.executable, "-c", program, port], log_path=log_path))
        return servers[0]

    monkeypatch.setattr(model, "start_guarded", start)
    monkeypatch.setattr(model, "ATTEMPTS", 1)

    async def ask() -> None:
        async with model.serving_model(tmp_path, tmp_path / "log", 1, 8, "auto", lambda _: None) as url:
            endpoint = Endpoint(url, "policy", chat=False)
            await servers[0].wait()
            async with endpoint.make_client(1) as client, asyncio.TaskGroup() as group:
                group.create_task(endpoint.complete(client, {"prompt": "1+1="}))

    with pytest.raises(UnavailableError, match=r"vllm ended with exit code 1: ValueError: out of memory"):
        await ask()


def test_a_run_is_asked_as_it_was_trained(tmp_path: Path, suite: LoadedSuite) -> None:
    write_chat_model(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text("run: {chat: never, instruction: Be brief.}")
    folder, run = find_model("run", tmp_path)
    endpoint = local_endpoint(folder, chat=True, run=run)
    [greedy] = make_attempts(suite, SamplingSettings(samples=0), endpoint, "")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(greedy.body["prompt"], skip_special_tokens=False) == "<bos>1+1=\nBe brief."
