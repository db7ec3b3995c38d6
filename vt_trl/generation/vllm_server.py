"""Turns sampled by a vLLM server on other GPUs or machines, with weights sent to it over NCCL.

Every training process is a client of its own: it sends a sample's next turn as soon as the last one has come back,
and waits for nobody. TRL's wrapper gathers the weights and sends them; pictures are prepared by the server once each
and then travel as features, because the server takes either token ids or pictures.
"""

from __future__ import annotations

import json
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
from PIL import Image
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter
from trl.generation.vllm_client import parse_logprobs

from vt_trl.errors import ConfigError, EngineOutage
from vt_trl.generation.base import Request, Sample, SamplingSettings
from vt_trl.generation.vllm_common import EngineWeights, ImageIds, pixel_limits, sampling_fields
from vt_trl.images import png_uri
from vt_trl.packing import placeholder_spans

logger = logging.getLogger(__name__)

_PASSING = {408, 429, 500, 502, 503, 504}  # statuses after which the same request may work
_FINAL_ONLY = 2  # vLLM's output kind: one answer with the whole completion


class ServerEngine(EngineWeights):
    """A vLLM server that holds a copy of ``model``; takes the arguments of TRL's ``VLLMGeneration`` for server mode.

    Raises ConfigError when the server was started with settings under which rollout and trainer would not agree, and
    EngineOutage when it cannot be reached within ``server_timeout`` seconds.
    """

    def _init_vllm(self) -> None:
        self.base_url = (self.server_base_url or f"http://{self.server_host}:{self.server_port}").rstrip("/")
        self.http = httpx.Client(base_url=self.base_url, timeout=httpx.Timeout(30.0, read=600.0))
        self._wait_until_up()
        if self.accelerator.is_main_process:
            self.check_settings(self.get("/server_info", config_format="json")["vllm_config"])
        self._connect()

    def _connect(self) -> None:
        super()._init_vllm()  # TRL's client on the main process, and the NCCL group with the server's workers

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """A JSON answer of the server; raises ConfigError where an endpoint is missing, with how to start it."""
        answer = self.http.get(path, params=query)
        if answer.status_code == 404:
            raise ConfigError(f"The vLLM server at {self.base_url} has no {path}. {self.how_to_start()}")
        answer.raise_for_status()
        return answer.json()

    def how_to_start(self) -> str:
        limits = pixel_limits(self.processing_class)
        kwargs = "" if limits is None else f" --mm-processor-kwargs '{json.dumps(limits)}'"
        return (
            f"Start it with: VLLM_SERVER_DEV_MODE=1 vllm serve {self.model.name_or_path} --enable-scale-out "
            f'--logprobs-mode processed_logprobs --weight-transfer-config \'{{"backend": "nccl"}}\'{kwargs}'
        )

    def check_settings(self, config: dict[str, Any]) -> None:
        """Raise ConfigError for a server whose log-probabilities or pictures would not be those of training."""
        model = config.get("model_config", {})
        mode = model.get("logprobs_mode")
        if mode != "processed_logprobs":
            raise ConfigError(
                f"The vLLM server at {self.base_url} reports {mode!r}: log-probabilities before temperature and bans, "
                f"which are not those of the distribution that was sampled from. {self.how_to_start()}"
            )
        ours = pixel_limits(self.processing_class)
        theirs = (model.get("multimodal_config") or {}).get("mm_processor_kwargs") or model.get("mm_processor_kwargs")
        if ours is not None and theirs is not None and theirs.get("size", ours["size"]) != ours["size"]:
            raise ConfigError(
                f"The vLLM server at {self.base_url} shows pictures within {theirs}, training within {ours}. "
                f"{self.how_to_start()}"
            )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.server_timeout
        while True:
            try:
                if self.http.get("/health").status_code == 200:
                    return
                problem = "it is not healthy yet"
            except httpx.TransportError as error:
                problem = str(error)
            if time.monotonic() >= deadline:
                raise EngineOutage(
                    f"No vLLM server answered at {self.base_url} within vllm_server_timeout ({self.server_timeout} "
                    f"seconds): {problem}. Check vllm_server_host, vllm_server_port or vllm_server_base_url. "
                    f"{self.how_to_start()}"
                )
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))

    def sync_weights(self) -> None:
        """Send the weights and have the server forget what it computed with the old ones. A collective.

        TRL resets the prefix cache only; image features of an old vision tower would be sampled from.
        """
        self.accelerator.wait_for_everyone()  # no process still samples with the old weights
        self._send_weights()
        if self.accelerator.is_main_process:
            for name in ("reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"):
                self.http.post(f"/{name}").raise_for_status()
        self.accelerator.wait_for_everyone()  # nobody samples before the new ones are there

    def _send_weights(self) -> None:
        super().sync_weights()

    def wake(self, stale: bool) -> None:
        if stale:
            self.sync_weights()

    def sleep(self) -> None:
        """The server keeps its own GPUs; there is nothing to give back."""


class ServerBackend:
    """Samples turns on a :class:`ServerEngine`; implements :class:`vt_trl.generation.base.Backend`.

    Args:
        image_token_id, eos_token_ids, banned_ids, weights_version: as for the colocated backend.
        concurrency: requests of this process that wait for the server at a time, at most.
        attempts: how often a request is sent before the run stops; a server that restarts has lost its weights.
    """

    def __init__(
        self,
        engine: ServerEngine,
        *,
        image_token_id: int,
        eos_token_ids: Sequence[int],
        banned_ids: Sequence[int],
        weights_version: Callable[[], int],
        concurrency: int = 128,
        attempts: int = 6,
    ):
        self.engine = engine
        self.image_token_id = image_token_id
        self.eos_token_ids = list(eos_token_ids)
        self.banned_ids = list(banned_ids)
        self.weights_version = weights_version
        self.concurrency = concurrency
        self.attempts = attempts
        self._model: str | None = None
        self._pushed: int | None = None
        self._settings = SamplingSettings()
        self._names = count()
        self._pool: ThreadPoolExecutor | None = None
        self._picture_pool: ThreadPoolExecutor | None = None
        self._done: queue.SimpleQueue[Future[Sample]] = queue.SimpleQueue()
        self._running: set[Future[Sample]] = set()
        self._features: dict[str, Future[dict[str, Any]]] = {}
        self._image_id = ImageIds()

    def begin(self, settings: SamplingSettings) -> None:
        self.end()  # what an interrupted phase may have left
        version = self.weights_version()
        self.engine.wake(stale=version != self._pushed)
        self._pushed, self._settings = version, settings
        if self._model is None:
            self._model = self.engine.get("/v1/models")["data"][0]["id"]
        # As many threads again for pictures, which requests wait for: in one pool they could wait for each other.
        self._pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="turns")
        self._picture_pool = ThreadPoolExecutor(min(16, self.concurrency), thread_name_prefix="pictures")

    def submit(self, request: Request) -> None:
        """Raises RuntimeError when there are not as many pictures as placeholder runs."""
        runs = placeholder_spans(request.token_ids, self.image_token_id)
        if len(runs) != len(request.images):
            raise RuntimeError(f"{len(runs)} runs of image placeholders for {len(request.images)} images")
        pictures = [self._picture(image) for image in request.images]
        future = self._pool.submit(self._sample, request, runs, pictures)
        self._running.add(future)
        future.add_done_callback(self._done.put)

    def completed(self) -> Iterator[Sample]:
        """Raises EngineOutage when a request has failed for good; the other requests are given up."""
        while self._running:
            future = self._done.get()
            if future not in self._running:
                continue  # of a phase that was given up
            self._running.remove(future)
            try:
                sample = future.result()
            except Exception:
                self.end()
                raise
            yield sample

    def end(self) -> None:
        for future in self._running:
            future.cancel()
        self._running.clear()
        self._features.clear()
        self._image_id.clear()
        for pool in (self._pool, self._picture_pool):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._picture_pool = None

    def _picture(self, image: Image.Image) -> Future[dict[str, Any]]:
        """The server's features of a picture, asked for once per phase and picture."""
        name = self._image_id(image)
        if name not in self._features:
            self._features[name] = self._picture_pool.submit(self._render, image)
        return self._features[name]

    def _render(self, image: Image.Image) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": png_uri(image)}}]  # the server must see the very pixels
        body = {"model": self._model, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return self._post("/v1/chat/completions/render", body)["features"]

    def _sample(self, request: Request, runs: list[tuple[int, int]], pictures: list[Future[dict[str, Any]]]) -> Sample:
        body: dict[str, Any] = {
            "request_id": f"vt_trl-{next(self._names)}-{time.time_ns()}",
            "model": self._model,
            "token_ids": list(request.token_ids),
            "sampling_params": self._sampling_params(request),
        }
        if pictures:
            body["features"] = merged_features([future.result() for future in pictures], runs, request.request_id)
        choice = self._post("/inference/v1/generate", body)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineOutage(f"vLLM gave request {request.request_id} up ({choice['finish_reason']}).")
        ids = tuple(choice["token_ids"])
        values, sampled = parse_logprobs([choice["logprobs"]])
        logprobs = tuple(dict(zip(names, row, strict=True))[token] for token, names, row in
                         zip(ids, sampled[0], values[0], strict=True))  # fmt: skip
        return Sample(request.request_id, ids, logprobs, choice["finish_reason"] == "stop")

    def _sampling_params(self, request: Request) -> dict[str, Any]:
        fields = sampling_fields(self._settings, request, self.eos_token_ids, self.banned_ids)
        return fields | {"n": 1, "output_kind": _FINAL_ONLY}

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's JSON answer; tries again when it is busy or the line breaks, and says why it gave up."""
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(initial=0.5, max=20.0),
            reraise=True,
        )
        try:
            return retrying(self._post_once, path, body)
        except httpx.HTTPError as error:
            raise EngineOutage(
                f"The vLLM server at {self.engine.base_url} failed at {path} after {self.attempts} tries: "
                f"{_told(error)}. If it was restarted, it has lost the trained weights: go on with "
                f"--resume_from_checkpoint true, which sends them again."
            ) from error

    def _post_once(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.engine.http.post(path, json=body)
        if answer.status_code == 404:
            raise ConfigError(f"The vLLM server has no {path}. {self.engine.how_to_start()}")
        answer.raise_for_status()
        return answer.json()


def merged_features(
    pictures: Sequence[dict[str, Any]], runs: Sequence[tuple[int, int]], request_id: int
) -> dict[str, Any]:
    """Features of single pictures as those of one prompt, at the prompt's placeholder runs of (start, end).

    Raises RuntimeError when the server made another number of visual tokens of a picture than training does.
    """
    ours = [end - start for start, end in runs]
    theirs = [one["mm_placeholders"]["image"][0]["length"] for one in pictures]
    if ours != theirs:
        raise RuntimeError(
            f"request {request_id}: its images take {ours} placeholder tokens here and {theirs} in vLLM: it saw "
            f"pictures that training would not. Give both image processors the same limits (--mm-processor-kwargs)."
        )
    merged: dict[str, Any] = {
        "mm_hashes": {"image": [one["mm_hashes"]["image"][0] for one in pictures]},
        "mm_placeholders": {"image": [{"offset": start, "length": end - start} for start, end in runs]},
    }
    for name in ("kwargs_data", "mm_metadata"):
        if all(one.get(name) for one in pictures):
            merged[name] = {"image": [one[name]["image"][0] for one in pictures]}
    return merged


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _PASSING
    return isinstance(error, httpx.TransportError)


def _told(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}, {error.response.text[:300]}"
    return f"{type(error).__name__}: {error}"
