"""The worker: one engine, the policy version that it holds, how much it does, and the supervision of its process."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeAlias, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from perigee.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    PerigeeError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.weights.v1.weights_pb2 import CommitResponse, Manifest
from services.kit.server import end_tasks
from services.kit.telemetry import get_logger
from services.kit.tracing import span
from services.rollout.config import RolloutConfig
from services.rollout.engine import Engine, EngineDiedError, EngineRequest
from services.rollout.images import ImageStore
from services.rollout.model import PolicyModel
from services.rollout.residence import Keep, Residence, Restart, Sleep
from services.weights.manifest import WeightImage
from services.weights.pieces import Slices

log = get_logger(__name__)

ResultT = TypeVar("ResultT")
WorkerStatus: TypeAlias = "pb.WorkerStatus.ValueType"
STARTING, EMPTY = pb.WORKER_STATUS_STARTING, pb.WORKER_STATUS_EMPTY
READY, DRAINING = pb.WORKER_STATUS_READY, pb.WORKER_STATUS_DRAINING
AWAY = pb.WORKER_STATUS_AWAY

GENERATED_TOKENS = Counter("perigee_rollout_generated_tokens", "Response tokens generated.")
ENGINE_SECONDS = Counter(
    "perigee_rollout_engine_seconds", "Seconds of the engine's steps: `prefill` of tokens, or `decode`.", ["kind"]
)
SEGMENTS = Counter("perigee_rollout_segments", "Segments by the reason for their end; `failed` is one.", ["end_reason"])
RUNNING = Gauge("perigee_rollout_running_sequences", "Sequences accepted and not ended.")
IS_READY = Gauge("perigee_rollout_ready", "1 while the worker holds pushed weights and serves.")
POLICY_VERSION = Gauge("perigee_rollout_policy_version", "Policy version that the engine holds.")
ENGINE_RESTARTS = Counter("perigee_rollout_engine_restarts", "Engines that died and were started again.")
ENGINE_START_SECONDS = Histogram(
    "perigee_rollout_engine_start_seconds", "Seconds until an engine runs.", buckets=(5, 10, 20, 40, 80, 160, 320)
)
COMMIT_SECONDS = Histogram("perigee_rollout_commit_seconds", "Seconds of a weight commit in the engine.")
STALL_SECONDS = Histogram("perigee_rollout_stall_seconds", "Seconds without a token in a weight commit.")
FINGERPRINT_DIFFERENCE = Gauge(
    "perigee_rollout_fingerprint_difference", "Mean difference from the trainer's log-probabilities after a pull, nats."
)
# Mean difference of two programs that compute the same, nats: several times what was measured (5e-6 in float32, 0.04 in
# bfloat16). The coarser of the trainer's type and the engine's counts.
TOLERANCES = {"F32": 0.01, "float32": 0.01, "F16": 0.1, "float16": 0.1}
COARSE_TOLERANCE = 0.3
# A model whose own differences are larger may differ by this much more than the largest of the last ones.
NOISE_FACTOR = 4
NOISE_SAMPLES = 8


class Worker:
    """State of one engine; changes of status or version wake everybody who awaits `wait_change`."""

    def __init__(self, config: RolloutConfig, model: PolicyModel, engine: Engine, worker_id: str) -> None:
        self.config = config
        self.model = model
        self.engine = engine
        self.images = ImageStore(config, model)
        self.worker_id = worker_id
        self.status: WorkerStatus = STARTING
        self.run_id = ""
        self.policy_version = 0
        self.running = 0
        self.generated_tokens = 0
        self.engine_restarts = 0
        self.broken = asyncio.Event()
        """Set when the engine must be restarted though its process lives."""
        self._committing = asyncio.Lock()
        # Of the engine, under way: the first one runs, the others wait for it.
        self._changes: set[asyncio.Task[Any]] = set()
        # Of the last leave, and the iteration of a run that the last call named.
        self._residence: Residence = Restart()
        # Calls that extend trajectories, and seconds of prefill and decoding that none of them has reported.
        self._extending = 0
        self._engine_seconds = (0.0, 0.0)
        self.max_kv_staleness = 0
        """Versions by which cached prefixes may be older than the weights, as the run's last call has it."""
        # Of the weights that cached prefixes were computed with: the oldest version, and what the newest is.
        self._oldest_prefix = 0
        self._checksums: list[bytes] = []
        self._iteration = ("", 0)
        self.returns = 0
        """Times that the worker came back."""
        self._changed = asyncio.Event()
        # Differences of the fingerprints that were served, and what is refused and why, by what its trainer computes.
        self._noise: deque[float] = deque(maxlen=NOISE_SAMPLES)
        self._refused: dict[bytes, str] = {}

    @property
    def status_name(self) -> str:
        """Returns the status as a word, `ready` for instance."""
        return pb.WorkerStatus.Name(self.status).removeprefix("WORKER_STATUS_").lower()

    def set_status(self, status: WorkerStatus, run_id: str = "", policy_version: int = 0) -> None:
        """Moves to a status, with the weights that go with it; DRAINING is final."""
        if self.status == DRAINING:
            return
        self.status, self.run_id, self.policy_version = status, run_id, policy_version
        IS_READY.set(status == READY)
        POLICY_VERSION.set(policy_version)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self) -> None:
        """Returns at the next change of status or policy version."""
        await self._changed.wait()

    def check_ready(self, run_id: str, policy_version: int | None) -> None:
        """Raises FailedPreconditionError unless the worker holds these weights; an empty run id is any."""
        if self.status != READY:
            raise FailedPreconditionError(
                f"Worker {self.worker_id} is {self.status_name} and holds no weights: push a policy version."
            )
        if run_id and run_id != self.run_id:
            raise FailedPreconditionError(f"Worker {self.worker_id} holds the weights of run {self.run_id!r}.")
        if policy_version is not None and policy_version != self.policy_version:
            raise FailedPreconditionError(
                f"Worker {self.worker_id} holds policy version {self.policy_version}, not {policy_version}."
            )

    @property
    def prefix_salt(self) -> str:
        """Returns what keeps a request from cached prefixes of other weights than the worker's; "" without these."""
        return "" if self._oldest_prefix == self.policy_version else str(self.policy_version)

    def _keeps_prefixes(self, manifest: Manifest) -> bool:
        """Returns whether cached prefixes stay valid with other weights.

        With the same ones they do; with newer ones of the run by `max_kv_staleness`. An engine that is new or was
        asleep has none, and features of images are always those of the newest weights.
        """
        has_cache = self.status == READY or (self.status == AWAY and isinstance(self._residence, Keep))
        if not has_cache or self.model.vision is not None or manifest.run_id != self.run_id:
            return False
        if manifest.policy_version == self.policy_version:
            return list_checksums(manifest) == self._checksums
        age = manifest.policy_version - self._oldest_prefix
        return manifest.policy_version > self.policy_version and age <= self.max_kv_staleness

    def count_generated(self, tokens: int) -> None:
        """Counts tokens that the engine has generated."""
        self.generated_tokens += tokens
        GENERATED_TOKENS.inc(tokens)

    @asynccontextmanager
    async def extending(self) -> AsyncIterator[None]:
        """Counts a call that extends trajectories; what the engine did while there was none is nobody's to report."""
        if not self._extending:
            await self.count_engine_seconds()
            self._engine_seconds = (0.0, 0.0)
        self._extending += 1
        try:
            yield
        finally:
            self._extending -= 1

    async def count_engine_seconds(self) -> None:
        """Counts what the engine did since the last time."""
        found = await self.engine.take_seconds()
        for kind, seconds in zip(("prefill", "decode"), found, strict=True):
            ENGINE_SECONDS.labels(kind).inc(seconds)
        self._engine_seconds = (self._engine_seconds[0] + found[0], self._engine_seconds[1] + found[1])

    async def take_engine_seconds(self) -> tuple[float, float]:
        """Returns the seconds of prefill and of decoding, of all calls under way, that no call has reported."""
        await self.count_engine_seconds()
        found, self._engine_seconds = self._engine_seconds, (0.0, 0.0)
        return found

    @contextmanager
    def admit(self, sequences: int) -> Iterator[Admission]:
        """Counts sequences as running until they leave, at the latest when the block ends.

        Raises ResourceExhaustedError when the worker has too many.
        """
        limit = self.config.max_queued_sequences
        if self.running + sequences > limit:
            raise ResourceExhaustedError(
                f"Worker {self.worker_id} has {self.running} of at most {limit} sequences.", retry_after_s=1.0
            )
        admission = Admission(self, sequences)
        try:
            yield admission
        finally:
            admission.leave(admission.running)

    async def commit(self, image: WeightImage) -> CommitResponse:
        """Loads a whole checkpoint into the engine, between two forward passes.

        Raises InvalidArgumentError when the checkpoint is not this model's (the old version serves on),
        UnavailableError when no engine runs, InternalError when the engine failed half-way and is restarted, and
        FailedPreconditionError when what it computes is not what the trainer does: the worker is EMPTY then.
        """
        return await self._finish(self._commit_alone(image))

    async def find_slices(self, manifest: Manifest) -> Slices | None:
        """Returns what the engine takes of a checkpoint that is to be pulled; None where nobody knows: all of it.

        Raises FailedPreconditionError for one that was refused.
        """
        self._check_refused(manifest)
        async with self._committing:
            try:
                return await self.engine.find_slices(manifest)
            except EngineDiedError:
                return None

    async def _finish(self, change: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Runs a change of the engine to its end: a caller that goes away must not leave it half-loaded and paused."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Ends changes under way, and the engine that one of them may have started since its supervisor ended."""
        if changes := list(self._changes):
            for change in changes:
                change.cancel()
            await asyncio.wait(changes)
        await self.images.close()
        await self.engine.stop()

    async def _commit_alone(self, image: WeightImage) -> CommitResponse:
        """Commits when no other commit runs and the engine is up."""
        async with self._committing:
            self._check_refused(image.manifest)
            await self._wait_started()
            await asyncio.to_thread(self.model.check_image, image)
            if self.status not in (EMPTY, READY, AWAY):
                raise UnavailableError("The engine died before the commit and is restarted.")
            return await self._update(image)

    def check_iteration(self, run_id: str, iteration: int) -> None:
        """Raises FailedPreconditionError when a call is of an iteration before the last one that was named."""
        if self._iteration[0] == run_id and iteration < self._iteration[1]:
            raise FailedPreconditionError(f"Run {run_id} is in iteration {self._iteration[1]}, not {iteration}.")
        self._iteration = (run_id, iteration)

    async def leave(self, residence: Residence) -> int:
        """Becomes AWAY unless it is, and gives the engine's memory back; returns the bytes that were freed.

        Raises UnavailableError when no engine runs, FailedPreconditionError when it is to sleep and cannot,
        InternalError when it failed and is restarted.
        """
        return await self._finish(self._leave_alone(residence))

    async def _leave_alone(self, residence: Residence) -> int:
        async with self._committing:
            await self._wait_started(again=True)
            if self.status == AWAY:
                return 0
            if self.status not in (EMPTY, READY):
                raise UnavailableError("The engine died and is restarted.")
            if isinstance(residence, Sleep) and not self.engine.can_sleep:
                raise FailedPreconditionError(
                    "The engine cannot sleep: set rollout.enable_sleep_mode, or run.hybrid.engine to restart."
                )
            before = await asyncio.to_thread(self.engine.count_memory)
            self.set_status(AWAY, self.run_id, self.policy_version)
            self._residence = residence
            try:
                async with self._update_in_time():
                    await residence.leave(self.engine)
            except Exception as error:
                self._break()
                raise InternalError(f"The engine failed when it left and is restarted: {error}") from error
            return before - await asyncio.to_thread(self.engine.count_memory)

    @property
    def is_away(self) -> bool:
        """Whether it is AWAY and neither leaves nor comes back."""
        return self.status == AWAY and not self._committing.locked()

    async def come_back(self, held_image: Callable[[], WeightImage | None]) -> None:
        """Becomes READY with the weights that are still in memory if it is AWAY.

        Raises FailedPreconditionError when there are none, and what `commit` raises.
        """
        await self._finish(self._come_back_alone(held_image))

    async def _come_back_alone(self, held_image: Callable[[], WeightImage | None]) -> None:
        async with self._committing:
            if self.status != AWAY:
                return
            if (image := held_image()) is None:
                raise FailedPreconditionError(f"Worker {self.worker_id} holds no weights: push a policy version.")
            await self._update(image)

    async def _load(self, image: WeightImage, keep_prefixes: bool) -> float:
        """Loads weights into the engine, or has it come back with them: another engine where this one does not.

        Returns the seconds in which it generated nothing; 0 when it was away.
        """
        if self.status != AWAY:
            async with self._update_in_time():
                return await self.engine.update_weights(image, keep_prefixes=keep_prefixes)
        try:
            async with self._update_in_time():
                await self._residence.come_back(self.engine, image, keep_prefixes=keep_prefixes)
        # Whatever it is, another engine need not have it.
        except Exception as error:
            log.error("engine did not come back; another is started", exc_info=error)
            async with self._update_in_time():
                await Restart().come_back(self.engine, image)
        self.returns += 1
        return 0.0

    def _update_in_time(self) -> AbstractAsyncContextManager[None]:
        return in_time(self.config.update_timeout_seconds, "update_timeout_seconds")

    def _break(self) -> None:
        """Has the engine restarted: nobody knows what it holds."""
        self.set_status(STARTING)
        self.broken.set()

    async def refill(self, image: WeightImage | None) -> None:
        """Makes a started engine EMPTY, or READY again with weights that are still in memory.

        Commits wait until this is done. Raises what `commit` raises.
        """
        if image is None:
            self.set_status(EMPTY)
        else:
            await self._update(image)

    async def _wait_started(self, again: bool = False) -> None:
        """Waits for the first engine; raises UnavailableError when it takes too long or the worker shuts down.

        Commits do not wait for one that starts again after its death: others wait for the end of their push.
        """
        if self.status == STARTING and self.engine_restarts and not again:
            raise UnavailableError(f"The engine of worker {self.worker_id} died and starts again.")
        try:
            async with asyncio.timeout(self.config.commit_wait_seconds):
                while self.status == STARTING:
                    await self.wait_change()
        except TimeoutError as error:
            raise UnavailableError(f"The engine of worker {self.worker_id} did not start in time.") from error
        if self.status == DRAINING:
            raise UnavailableError(f"Worker {self.worker_id} shuts down.")

    async def _update(self, image: WeightImage) -> CommitResponse:
        """Loads the image and becomes READY, or EMPTY when it is refused; a failure restarts the engine."""
        start = time.monotonic()
        generation = self.engine_restarts
        report = CommitResponse()
        keep_prefixes = self._keeps_prefixes(image.manifest)
        try:
            with span("load weights", worker=self.worker_id, version=image.manifest.policy_version):
                report.stall_seconds = await self._load(image, keep_prefixes)
                report.warning = await self._check_fingerprint(image)
        except FailedPreconditionError:
            self.set_status(EMPTY)
            raise
        except Exception as error:
            # One that has died meanwhile is restarted already.
            if self.engine_restarts == generation:
                self._break()
            if isinstance(error, EngineDiedError):
                raise UnavailableError("The engine died during the commit and is restarted.") from error
            raise InternalError(f"The engine failed in the commit and is restarted: {error}") from error
        if self.engine_restarts != generation:
            raise UnavailableError("The engine died right after the commit and is restarted.")
        manifest = image.manifest
        if not keep_prefixes:
            self._oldest_prefix = manifest.policy_version
        self._checksums = list_checksums(manifest)
        self.set_status(READY, manifest.run_id, manifest.policy_version)
        seconds = time.monotonic() - start
        COMMIT_SECONDS.observe(seconds)
        if report.stall_seconds:
            STALL_SECONDS.observe(report.stall_seconds)
        log.info(
            "weights in the engine",
            run=manifest.run_id,
            policy_version=manifest.policy_version,
            seconds=round(seconds, 4),
            stall_seconds=round(report.stall_seconds, 4),
            oldest_prefix=self._oldest_prefix,
        )
        return report

    async def _check_fingerprint(self, image: WeightImage) -> str:
        """Compares what the engine computes with what the trainer computes, where the image says it.

        Beyond the tolerance one other engine is loaded with the same image. What that computes is served where it is
        within `max_fingerprint_difference`, and refused for good where it is not: a third engine would compute the
        same. Returns what is wrong, "" for nothing; raises FailedPreconditionError.
        """
        prompt = image.manifest.fingerprint.token_ids
        # The engine refuses a prompt that fills its context.
        if not image.manifest.HasField("fingerprint") or len(prompt) >= self.model.context_tokens:
            return ""
        tolerance = self._tolerance(image.manifest)
        try:
            first = found = await self._measure_difference(image)
        except DeadlineExceededError as error:
            log.warning("fingerprint not compared", reason=error.message)
            return ""
        warning = ""
        if not found <= tolerance:
            log.warning("fingerprint differs; the engine is replaced", difference=first, tolerance=tolerance)
            # An engine that ends while the worker is away has not died. One that is refilled nobody watches, and who is
            # away would give the weights in memory up, which it reads.
            if self.status != STARTING:
                self.set_status(AWAY, self.run_id, self.policy_version)
            async with self._update_in_time():
                await Restart().come_back(self.engine, image)
            self.returns += 1
            found = await self._measure_difference(image)
            warning = (
                f"version {image.manifest.policy_version}: log-probabilities of the fingerprint were {first:.3g} nats "
                f"from the trainer's on average, above {tolerance:.3g}; {found:.3g} in an engine that took its place"
            )
        limit = self.config.max_fingerprint_difference
        if not found <= limit:
            refused = f"{warning}, above rollout.max_fingerprint_difference {limit:g}: refused"
            self._refused[_fingerprint_key(image.manifest)] = refused
            raise FailedPreconditionError(refused)
        self._noise.append(found)
        return warning

    def _tolerance(self, manifest: Manifest) -> float:
        """Returns the difference up to which an engine need not be replaced, nats."""
        own = self.config.dtype if self.config.dtype != "auto" else self.model.dtype
        types = {own, *(tensor.dtype for tensor in manifest.tensors)}
        floors = [TOLERANCES.get(each, COARSE_TOLERANCE) for each in types]
        noise = [NOISE_FACTOR * each for each in self._noise]
        return min(max(floors + noise), self.config.max_fingerprint_difference)

    async def _measure_difference(self, image: WeightImage) -> float:
        """Returns the mean difference of the engine's log-probabilities.

        Raises DeadlineExceededError when the engine has no place for the prompt.
        """
        expected = image.manifest.fingerprint
        async with in_time(self.config.fingerprint_timeout_seconds, "fingerprint_timeout_seconds"):
            found = await score_prompt(self.engine, expected.token_ids)
        pairs = zip(expected.logprobs, found, strict=True)
        difference = sum(abs(trainer - engine) for trainer, engine in pairs) / len(found)
        FINGERPRINT_DIFFERENCE.set(difference)
        return difference

    def _check_refused(self, manifest: Manifest) -> None:
        """Raises FailedPreconditionError for weights whose fingerprint was refused."""
        if manifest.HasField("fingerprint") and (reason := self._refused.get(_fingerprint_key(manifest))):
            raise FailedPreconditionError(reason)


def list_checksums(manifest: Manifest) -> list[bytes]:
    """Returns checksums of all weights, the same for the same bytes in the same shards or pieces."""
    return [*(shard.checksum.encode() for shard in manifest.shards), *(piece.checksum for piece in manifest.pieces)]


def _fingerprint_key(manifest: Manifest) -> bytes:
    """Returns what names weights by what they compute: every export of them has it."""
    return manifest.run_id.encode() + manifest.fingerprint.SerializeToString(deterministic=True)


async def score_prompt(engine: Engine, token_ids: Sequence[int]) -> list[float]:
    """Returns the engine's log-probability of each token after the first, at temperature 1."""
    request = EngineRequest(
        request_id=f"fingerprint-{uuid.uuid4().hex}",
        token_ids=list(token_ids),
        max_tokens=1,
        temperature=0.0,
        seed=None,
        stop_token_ids=(),
        stride_tokens=1,
        score_prompt=True,
    )
    scores: list[float] = []
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            scores += [score.logprob for score in output.prompt_scores]
    return scores


class Admission:
    """Sequences that one call has running."""

    def __init__(self, worker: Worker, sequences: int) -> None:
        self._worker = worker
        self.running = 0
        self.leave(-sequences)

    def leave(self, sequences: int = 1) -> None:
        """Counts sequences that have ended."""
        self.running -= sequences
        self._worker.running -= sequences
        RUNNING.set(self._worker.running)


@asynccontextmanager
async def in_time(seconds: float, key: str) -> AsyncIterator[None]:
    """Ends the block after so many seconds, which the key sets, with DeadlineExceededError."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise DeadlineExceededError(f"not within {seconds:g} s (rollout.{key})") from error


async def supervise(
    worker: Worker, held_image: Callable[[], WeightImage | None], on_fatal: Callable[[InternalError], None]
) -> None:
    """Keeps an engine running until cancelled, and stops it then; calls `on_fatal` when it cannot be started.

    An engine that died is filled with the last committed weights when they are still in memory.
    """
    refilled = True
    try:
        while (error := await _start_engine(worker)) is None:
            # Weights that broke the engine are not tried a second time.
            refilled = await _refill(worker, held_image() if refilled else None)
            await _wait_end(worker)
            worker.set_status(STARTING)
            worker.engine_restarts += 1
            ENGINE_RESTARTS.inc()
            log.error("engine died", running=worker.running, restarts=worker.engine_restarts)
            await worker.engine.stop()
        on_fatal(error)
    finally:
        await worker.engine.stop()


async def _start_engine(worker: Worker) -> InternalError | None:
    """Starts the engine; returns the error of the last attempt when none succeeds."""
    settings = worker.config.supervision
    attempt = 0
    while True:
        start = time.monotonic()
        try:
            async with in_time(settings.start_seconds, "supervision.start_seconds"):
                await worker.engine.start()
            break
        # Whatever keeps an engine from starting is logged; another attempt needs the same clean-up.
        except Exception as error:
            attempt += 1
            log.error("engine did not start", attempt=attempt, exc_info=error)
            await worker.engine.stop()
            if attempt >= settings.start_attempts:
                return InternalError(f"The engine did not start in {attempt} attempts: {error}")
            await asyncio.sleep(settings.retry_seconds)
    seconds = time.monotonic() - start
    ENGINE_START_SECONDS.observe(seconds)
    log.info("engine started", seconds=round(seconds, 2), restarts=worker.engine_restarts)
    worker.broken.clear()
    return None


async def _refill(worker: Worker, image: WeightImage | None) -> bool:
    """Fills a started engine; returns whether it took the weights."""
    try:
        await worker.refill(image)
    except PerigeeError as error:
        log.error("engine not refilled", error=error.message)
        return False
    return True


async def _wait_end(worker: Worker) -> None:
    """Returns when the engine has died or must be restarted.

    One that ends while the worker is away, comes back; one that ends while it shuts down, is not needed any more.
    """
    while True:
        returns = worker.returns
        await _wait_death(worker)
        while worker.status == DRAINING or (worker.status == AWAY and not worker.broken.is_set()):
            await worker.wait_change()
        # After a return the death may be that of an engine which another one has replaced.
        if worker.broken.is_set() or worker.returns == returns:
            return


async def _wait_death(worker: Worker) -> None:
    waits = [asyncio.create_task(worker.engine.wait_dead()), asyncio.create_task(worker.broken.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_tasks(*waits)
