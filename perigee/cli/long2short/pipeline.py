"""`perigee long2short`: four ways from a long model to short responses, each a step, and their comparison."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console

from perigee.cli import train
from perigee.cli.choose import begin_second_phase, choose_checkpoint
from perigee.cli.ending import Interrupt
from perigee.cli.eval.model import find_model
from perigee.cli.eval.responses import ModelOptions, note
from perigee.cli.eval.results import ANSWERS_FILE, RESULTS_FILE, read_answers
from perigee.cli.eval.run import EvalOptions, evaluate
from perigee.cli.eval.suites import DEFAULT_DATA, SamplingSettings
from perigee.cli.long2short.comparison import (
    COMPARISON_FILE,
    LONG,
    PAGE_FILE,
    SHORT,
    make_rows,
    show_table,
    write_comparison,
)
from perigee.cli.long2short.config import Long2ShortConfig
from perigee.cli.long2short.steps import Step, StepLog, choose_steps
from perigee.cli.merge.folders import plan_merge, write_merged
from perigee.cli.merge.methods import BASED, MergeSettings
from perigee.cli.recipe import (
    MODEL_SECTIONS,
    RECIPE_FILE,
    SUITE_PREFIX,
    Recipe,
    build_recipe,
    check_script,
    dump_yaml,
    replace_all,
)
from perigee.cli.run_folder import RunFolder, find_run
from perigee.cli.sample.run import FILES, REPORT_FILE, SAMPLES_FILE, SampleOptions, sample
from perigee.cli.sample.selection import PAIRS, SHORTEST, PairRules
from perigee.cli.view import open_view
from perigee.config import merge, validate
from perigee.errors import InvalidArgumentError
from perigee.files import write_atomically
from perigee.report.choice import Choice
from perigee.report.page import write_report
from perigee.reward.sources import Columns
from services.coordinator.run_config import RunConfig, SftStage

DATA, SAMPLES = "data", "samples"
# Of the runs of supervised methods: `perigee eval` measures all models alike.
LEAST_EVALUATION = {"every": 0, "samples": 1, "end_problems": 1, "greedy": False}
# Keys of a recipe that change nothing of what a step makes.
WITHOUT_EFFECT = ("name", "description", "local", "trackers")
# Responses at once where `rollout.max_num_seqs` does not say how many.
CONCURRENCY = 256


@dataclass(frozen=True)
class PipelineOptions:
    """Arguments of `perigee long2short`."""

    recipe: Recipe
    out: Path
    only: Sequence[str]
    """Steps to do, with those that they need; all when empty."""
    runs_path: Path
    plain: bool

    @property
    def config(self) -> Long2ShortConfig:
        """The recipe's section. Raises InvalidArgumentError when it has none, or no model to shorten."""
        config = self.recipe.head.long2short
        if config is None or config.long is None:
            raise InvalidArgumentError.for_field(
                f"{self.recipe.path.name}: long2short.long", "is required: the long model, as a folder, a URL or a run"
            )
        return config


@dataclass(frozen=True)
class Pipeline:
    """Steps of a recipe, whose values have `{long}`, `{start}`, `{data}` and others in the place of folders."""

    options: PipelineOptions
    console: Console
    interrupt: Interrupt
    folders: Mapping[str, Path]
    """Folders by the words that stand for them."""
    choice: Choice | None = None
    """How the start of the second phase was chosen among the checkpoints of the long model's run."""

    @property
    def config(self) -> Long2ShortConfig:
        """The recipe's section."""
        return self.options.config

    @property
    def run(self) -> Mapping[str, Any]:
        """The recipe's section `run`."""
        section: Mapping[str, Any] = self.options.recipe.values["run"]
        return section

    def steps(self) -> list[Step]:
        """Returns all steps in order. Raises InvalidArgumentError when a setting of one is wrong."""
        methods = {name: self.method(name) for name in self.config.methods}
        merged = [methods.pop("merge")] if "merge" in methods else []
        samples = [self.sampling()] if {"rejection", "dpo"} & set(self.config.methods) else []
        pairs = [self.pairing()] if "dpo" in self.config.methods else []
        # Merging comes first: models that do not fit are told before samples of one are drawn.
        return [*merged, *samples, *pairs, *methods.values(), *(self.evaluation(name) for name in self.compared())]

    def compared(self) -> list[str]:
        """Returns the names of all models, the long one first."""
        return [LONG, *([SHORT] if self.config.short else []), *self.config.methods]

    def method(self, name: str) -> Step:
        """Returns the step that makes a method's model."""
        if name == "merge":
            return self.merging()
        section = copy.deepcopy(dict(self.run))
        if name == "rl":
            begin_second_phase(section, self.config.rl.run, self.options.recipe.path.name)
            return self.training("rl", section, "{start}", files=self.sources())
        source, kind = (SAMPLES, SHORTEST) if name == "rejection" else (PAIRS, PAIRS)
        stage = {**getattr(self.config, name), "dataset": f"{{{source}}}/{FILES[kind]}"}
        validate(SftStage, stage, self.options.recipe.path.name, f"long2short.{name}")
        merge(section, {"iterations": 0, "sft": [stage], "evaluation": LEAST_EVALUATION})
        return self.training(name, section, "{long}", needs=[source])

    def training(
        self,
        name: str,
        section: Mapping[str, Any],
        start: str,
        needs: Sequence[str] = (),
        files: Sequence[Path] = (),
    ) -> Step:
        """Returns the step that trains a model by the recipe with another section `run`."""
        source = self.options.recipe.path
        values = copy.deepcopy(dict(self.options.recipe.values))
        for key in ("long2short", "prepare"):
            values.pop(key, None)
        values["run"] = dict(section)
        merge(values, {"model": start, **{part: {"model": start} for part in MODEL_SECTIONS}})
        validate(RunConfig, values["run"], source.name, f"long2short.{name}")
        recipe, run = build_recipe(source, values, ()), RunFolder(self.options.out / name)
        return Step(
            name=name,
            work=partial(self.train, run, recipe),
            outputs=[run.path / "model"],
            settings={key: value for key, value in values.items() if key not in WITHOUT_EFFECT},
            needs=needs,
            files=[self.folders[start], *files],
            command=f"perigee train --resume {run.path}",
        )

    async def train(self, run: RunFolder, recipe: Recipe) -> None:
        """Trains in the step's folder, where an earlier call may have begun."""
        run.create()
        expanded = recipe.expand(run, {word: str(folder) for word, folder in self.folders.items()})
        write_atomically(run.recipe_path, dump_yaml(expanded.values).encode())
        options = train.TrainOptions(recipe_path=None, resume=run.run_id, overrides=(), runs_path=run.path.parent)
        with open_view(self.options.plain) as view:
            await train.train(options, run, expanded, view, self.interrupt)
        write_report(run.path)

    def merging(self) -> Step:
        """Returns the step that merges the two models."""
        if self.config.short is None:
            raise InvalidArgumentError.for_field(
                f"{self.options.recipe.path.name}: long2short.short",
                "is required to merge: name it, or leave merge out",
            )
        config, out = self.config.merge, self.options.out / "merge" / "model"
        if (config.base is None) == (config.method in BASED):
            need = f"is required by {config.method}" if config.base is None else f"is for {' and '.join(BASED)} only"
            raise InvalidArgumentError.for_field(f"{self.options.recipe.path.name}: long2short.merge.base", need)
        models = [str(self.folders[word]) for word in ("{long}", "{short}")]
        base = str(self.folders["{base}"]) if config.base else None
        settings = MergeSettings(config.method, (1 - config.short_weight, config.short_weight))

        async def work() -> None:
            plan = await asyncio.to_thread(plan_merge, models, base, settings, self.options.runs_path, same_chat=False)
            cancelled = Event()
            try:
                await asyncio.to_thread(write_merged, plan, out, self.note, cancelled)
            finally:
                cancelled.set()  # of a thread that a cancelled task leaves behind

        weights = " ".join(f"--weight {weight:g}" for weight in settings.weights)
        return Step(
            name="merge",
            work=work,
            outputs=[out],
            settings=asdict(settings),
            files=list(map(Path, [*models, *([base] if base else [])])),
            command=f"perigee merge {' '.join(models)} --method {config.method} {weights} --out {out}",
        )

    def sampling(self) -> Step:
        """Returns the step that draws responses of the long model and selects the shortest correct ones."""
        out, long = self.options.out / SAMPLES, self.folders["{long}"]
        sampling = SamplingSettings(greedy=False, samples=self.config.samples.per_prompt, max_tokens=self.max_tokens)
        limit = self.config.samples.limit

        async def work() -> None:
            options = self.selecting(SHORTEST, out, sampling, self.asked(long))
            await sample(options, self.console, self.interrupt)

        return Step(
            name=SAMPLES,
            work=work,
            outputs=[out / SAMPLES_FILE, out / FILES[SHORTEST]],
            settings={"sampling": sampling.model_dump(), "limit": limit, "asked": self.asking},
            files=[long, self.prompts],
            command=f"perigee sample {self.prompts} --model {long} -n {sampling.samples} "
            f"--max-tokens {sampling.max_tokens}{limited(limit)} --out {out}",
        )

    def pairing(self) -> Step:
        """Returns the step that selects pairs of the samples that are drawn."""
        config, out = self.config.samples, self.options.out / PAIRS
        samples = self.options.out / SAMPLES / SAMPLES_FILE
        rules = f"--reject-longer {config.reject_longer or 0:g}" + ("" if config.reject_wrong else " --keep-wrong")

        async def work() -> None:
            unused = self.asked(self.folders["{long}"])
            options = replace(self.selecting(PAIRS, out, SamplingSettings(), unused), samples=samples)
            await sample(options, self.console, self.interrupt)

        return Step(
            name=PAIRS,
            work=work,
            outputs=[out / FILES[PAIRS]],
            settings=config.model_dump(include={"limit", "reject_wrong", "reject_longer"}),
            needs=[SAMPLES],
            files=[self.prompts],
            command=f"perigee sample {self.prompts} --samples {samples} --select {PAIRS} {rules}"
            f"{limited(config.limit)} --out {out}",
        )

    def selecting(self, kind: str, out: Path, sampling: SamplingSettings, asked: ModelOptions) -> SampleOptions:
        """Returns the options of one selection."""
        config = self.config.samples
        rules = PairRules(config.reject_wrong, config.reject_longer)
        return SampleOptions(self.prompts, Columns(), out, [kind], rules, sampling, asked, limit=config.limit)

    @property
    def prompts(self) -> Path:
        """The prompt file that samples are drawn for."""
        return Path(self.path_of(self.config.samples.prompts, "prompts", "samples.prompts"))

    def evaluation(self, name: str) -> Step:
        """Returns the step that measures a model on the problems that all are measured on."""
        config, out = self.config.comparison, self.options.out / f"evaluate-{name}"
        problems = self.path_of(config.problems, "heldout", "comparison.problems").removeprefix(SUITE_PREFIX)
        longest = config.max_tokens or self.max_tokens
        sampling = {"greedy": True, "samples": config.samples, "temperature": 1.0, "max_tokens": longest}
        folder = self.folders[f"{{{name}}}"] if name in (LONG, SHORT) else self.options.out / name / "model"

        async def work() -> None:
            options = EvalOptions(self.asked(folder), [problems], DEFAULT_DATA, out, config.limit, sampling)
            await evaluate(options, self.console, self.interrupt)

        is_made = name not in (LONG, SHORT)
        return Step(
            name=f"evaluate-{name}",
            work=work,
            outputs=[out / ANSWERS_FILE, out / RESULTS_FILE],
            settings={"limit": config.limit, "sampling": sampling, "asked": self.asking},
            needs=[name] if is_made else [],
            files=[*([] if is_made else [folder]), *([Path(problems)] if problems.endswith(".jsonl") else [])],
            command=f"perigee eval {folder} {problems} --greedy --samples {config.samples} --temperature 1 "
            f"--max-tokens {longest}{limited(config.limit)} --out {out}",
        )

    @property
    def asking(self) -> dict[str, Any]:
        """Settings of the run by which all models are asked."""
        return {key: self.run[key] for key in ("chat", "system_prompt", "instruction") if key in self.run}

    @property
    def max_tokens(self) -> int:
        """Response tokens at most, in samples and in the comparison."""
        return validate(RunConfig, self.run, self.options.recipe.path.name, "run").rollout.max_response_tokens

    def asked(self, folder: Path) -> ModelOptions:
        """Returns how a model is asked."""
        rollout = self.options.recipe.values["rollout"]
        return ModelOptions(
            target=str(folder),
            endpoint=None,
            chat=True,
            runs_path=self.options.runs_path,
            concurrency=rollout.get("max_num_seqs") or CONCURRENCY,
            dtype=rollout.get("dtype") or "auto",
            reward=None,
            plain=self.options.plain,
            run=self.asking,
        )

    def sources(self) -> list[Path]:
        """Returns the files of prompts and held-out problems that the recipe names by their paths alone."""
        named = [self.run[key] for key in ("prompts", "heldout") if isinstance(self.run[key], str)]
        return [path for path in map(Path, map(self.expand, named)) if path.is_file()]

    def expand(self, text: str) -> str:
        """Returns a text with folders in the place of the words that stand for them."""
        return replace_all(text, {word: str(folder) for word, folder in self.folders.items()})

    def path_of(self, given: str | None, key: str, field: str) -> str:
        """Returns the one path of a set, its own or that of the run; raises InvalidArgumentError when there is none."""
        source = given or self.run[key]
        if not isinstance(source, str):
            raise InvalidArgumentError.for_field(
                f"{self.options.recipe.path.name}: long2short.{field}", f"is required where run.{key} is not one path"
            )
        return self.expand(source)

    def note(self, text: str) -> None:
        """Prints a line."""
        note(self.console, text)


def limited(limit: int | None) -> str:
    """Returns the option of a command that takes the first prompts only."""
    return f" --limit {limit}" if limit else ""


def data_step(options: PipelineOptions) -> Step:
    """Returns the step that makes the recipe's data."""
    recipe, run = options.recipe, RunFolder(options.out)
    check_script(recipe)

    async def work() -> None:
        run.create()
        await train.prepare_data(run, recipe)

    files = [recipe.prepare_path] if recipe.prepare_path else []
    return Step(DATA, work, [run.data_path], {"seed": recipe.seed}, files=files)


def find_models(options: PipelineOptions) -> tuple[dict[str, Path], Choice | None]:
    """Returns the folders by the words that stand for them in the pipeline, and how `{start}` was chosen, if it was.

    Raises what `find_model` and `choose_checkpoint` raise.
    """
    config, out = options.config, options.out
    folders = {f"{{{name}}}": out / name for name in (DATA, SAMPLES, PAIRS)}
    folders["{recipe}"] = options.recipe.path.parent.absolute()
    words = {word: str(folder) for word, folder in folders.items()}
    for word, name in ((LONG, config.long), (SHORT, config.short), ("base", config.merge.base)):
        if name is not None:
            folders[f"{{{word}}}"] = find_model(replace_all(name, words), options.runs_path)[0]
    choice, folders["{start}"] = choose_start(options, folders["{long}"])
    return folders, choice


def choose_start(options: PipelineOptions, long: Path) -> tuple[Choice | None, Path]:
    """Returns the model that the second phase starts from: of a long model that is a run, the chosen checkpoint."""
    name = str(options.config.long)
    is_run = any((path / name / RECIPE_FILE).is_file() for path in (options.runs_path, Path()))
    if not is_run or "rl" not in options.config.methods:
        return None, long
    return choose_checkpoint(find_run(options.runs_path, name), options.config.rl.max_accuracy_loss)


async def run_pipeline(options: PipelineOptions, console: Console, interrupt: Interrupt) -> None:
    """Does the steps and compares the models that are evaluated by then.

    Raises PerigeeError, with what to do, when a setting is wrong or a step fails.
    """
    for section in ("run", "trainer", "rollout"):
        if section not in options.recipe.values:
            raise InvalidArgumentError.for_field(f"{options.recipe.path.name}: {section}", "is required for long2short")
    report = partial(note, console)
    report(f"{', '.join(options.config.methods)}: in {options.out}")
    with closing(StepLog(options.out)) as log:
        await log.run([data_step(options)], report)
        pipeline = Pipeline(options, console, interrupt, *find_models(options))
        for line in pipeline.choice.lines() if pipeline.choice else ():
            report(line)
        steps = pipeline.steps()
        await log.run(choose_steps(steps, options.only), report)
        done = {step.name for step in steps if log.is_done(step)}
        compared = {name: options.out / f"evaluate-{name}" for name in pipeline.compared()}
        answers = {name: read_answers(folder) for name, folder in compared.items() if folder.name in done}
    if LONG not in answers:
        report(f"nothing is compared before evaluate-{LONG} is done")
        return
    rows = make_rows(answers, options.config.comparison)
    failed = [f"{row.name}: {row.failures:,} answers without a verdict are left out" for row in rows if row.failures]
    facts = [*list_facts(pipeline), *failed]
    write_comparison(options.out, rows, facts, options.recipe.head.name)
    show_table(rows, facts, console)
    report(f"page: {options.out / PAGE_FILE}, figures: {options.out / COMPARISON_FILE}")


def list_facts(pipeline: Pipeline) -> list[str]:
    """Returns sentences on how the methods were run, of their settings and of what they were trained on."""
    config, folders = pipeline.config, pipeline.folders
    facts = [f"long: {folders['{long}']}; at most {pipeline.max_tokens:,} response tokens in samples and training"]
    if "merge" in config.methods:
        short = folders["{short}"]
        facts.append(f"merge: {config.merge.method}, with {config.merge.short_weight:g} of the short model {short}")
    for folder in (SAMPLES, PAIRS):
        path = pipeline.options.out / folder / REPORT_FILE
        if path.is_file():
            facts += list_sample_facts(json.loads(path.read_text()))
    if "rl" in config.methods:
        facts.append(f"rl: from {folders['{start}']}, with {json.dumps(config.rl.run)}")
    if pipeline.choice:
        chosen = pipeline.choice.chosen
        facts.append(
            f"rl starts from version {chosen.policy_version} of the long model's run, which had the shortest responses "
            f"({chosen.response_tokens:.1f} tokens, accuracy {chosen.accuracy}) of those evaluated as at least "
            f"{pipeline.choice.least_accuracy:.3f} accurate"
        )
    return facts


def list_sample_facts(report: Mapping[str, Any]) -> list[str]:
    """Returns sentences on the sets of rejection sampling and DPO, by the report of the samples."""
    selected, unit = report["selected"], report["length_unit"]
    facts = []
    if SHORTEST in selected:
        examples, chosen = selected[SHORTEST]["examples"], selected[SHORTEST]["length"]["mean"]
        facts.append(
            f"rejection: the shortest correct of {report['responses']:,} responses to {report['prompts']:,} prompts: "
            f"{examples:,} of {chosen:.1f} {unit} on average, where all correct ones have "
            f"{report['length']['correct']['mean']:.1f}"
        )
    if PAIRS in selected:
        chosen, rejected = (selected[PAIRS][f"{name}_length"]["mean"] for name in ("chosen", "rejected"))
        counts = selected[PAIRS]["rejected"]
        facts.append(
            f"dpo: {selected[PAIRS]['pairs']:,} pairs of {chosen:.1f} {unit} chosen and {rejected:.1f} rejected, "
            f"{counts['wrong_longer']:,} wrong and {counts['correct_longer']:,} correct ones"
        )
    return facts
