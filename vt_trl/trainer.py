"""GRPO over episodes: TRL's trainer with our path from a row to a batch.

What is ours: rows become episodes, rollouts, scores, a group penalty, advantages and tensors
(``_generate_and_score_completions``). What is TRL's and stays untouched: the loss, the optimizer, checkpoints, logging
and the training loop.

    trainer = VTGRPOTrainer(model="Qwen/Qwen2.5-VL-7B-Instruct", args=VTGRPOConfig("out"), train_dataset=rows)
    trainer.train()

``rows`` has the columns image, question, answer and optionally id and data_source (:mod:`vt_trl.data`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from vt_trl.alarm import CollapseAlarm
from vt_trl.chat import ChatEncoder
from vt_trl.config import VTGRPOConfig
from vt_trl.data import episode_row
from vt_trl.envs import Environment, make_environment
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.forward import PolicyForward
from vt_trl.forward.batches import loss_mask
from vt_trl.generation.backends import hf_backend, vllm_backend
from vt_trl.generation.base import Backend, SamplingSettings
from vt_trl.groups import Group, Refiller, effective_share, score_groups, set_advantages, without_loss
from vt_trl.metrics import mean
from vt_trl.packing import pack
from vt_trl.passes import add_logprobs
from vt_trl.progress import add_progress
from vt_trl.recorder import Recorder
from vt_trl.resume import EndInOrder, ResumableTrainer
from vt_trl.rewards import make_rewards
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.sharding import unsharded
from vt_trl.token_ban import ban_tokens
from vt_trl.transcripts.log import TranscriptLog
from vt_trl.types import Rollout, RolloutStatus
from vt_trl.update import UpdatingTrainer

logger = logging.getLogger(__name__)

PHASES = [f"time/{name}_seconds" for name in ("rollout", "logprob", "score")]


class VTGRPOTrainer(UpdatingTrainer, ResumableTrainer, GRPOTrainer):
    """GRPO over multi-turn episodes with pictures.

    Args:
        model: a model id, a folder, or a loaded model of a supported family (:mod:`vt_trl.families`).
        args: :class:`VTGRPOConfig`.
        reward_funcs: callables with TRL's signature; default: those named in ``args.rewards``. They also receive
            ``rollout``, a list of :class:`vt_trl.types.Rollout`. None as a score drops the whole group.
        environment: a factory of environments; default: the one named in ``args.environment``.
        backend: where turns are sampled; default: vLLM if ``args.use_vllm``, else transformers.
        Other arguments are those of :class:`trl.GRPOTrainer`.
    """

    _tag_names = ["trl", "grpo", "vt_trl"]

    def __init__(
        self,
        model: str | nn.Module,
        args: VTGRPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        reward_funcs: list[Callable[..., Any]] | None = None,
        environment: Callable[[], Environment] | None = None,
        backend: Backend | None = None,
        **kwargs: Any,
    ):
        # TRL would build an engine of its own here, and a table without turns and pictures; ours have other needs.
        ours = {name: getattr(args, name) for name in ("use_vllm", "log_completions")}
        args.use_vllm, args.log_completions = False, args.log_completions_hub_repo is not None
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs or make_rewards(args),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                **kwargs,
            )
        finally:
            vars(args).update(ours)
        self.log_completions = False  # TRL's own table; with log_completions_hub_repo it uploads the folder of ours
        self.reward_func_names = list(args.rewards) if reward_funcs is None else self.reward_func_names
        self.correct_column = self._find_correctness(args)
        self.recorder = Recorder(self.accelerator, self.reward_func_names)
        self.transcripts = TranscriptLog(self)
        self.progress = add_progress(self)
        self.refiller = Refiller(self)
        self.end_in_order = EndInOrder(self)
        self.add_callback(self.end_in_order)
        self._open_judges()
        self.last_rollouts: list[Rollout] = []
        self._setup_tokens()
        self.forward = PolicyForward(self)
        self._setup_rollouts(args, environment, backend)
        self.alarm = CollapseAlarm(self, args, has_tool=self.runner.environment().max_turns > 1)
        self.add_callback(self.alarm)

    def _find_correctness(self, args: VTGRPOConfig) -> int:
        if args.correctness_reward in self.reward_func_names:
            return self.reward_func_names.index(args.correctness_reward)
        if len(self.reward_func_names) == len(args.rewards):  # callables given in the order of the settings
            return args.rewards.index(args.correctness_reward)
        raise ValueError(
            f"correctness_reward is {args.correctness_reward!r}, but the reward functions are "
            f"{self.reward_func_names}; name the one that tells right from wrong."
        )

    def _open_judges(self) -> None:
        """Connect or load what judges, so that a missing key is an error now; and note who can start early."""
        for reward in self.reward_funcs:
            if hasattr(reward, "open"):
                reward.open()
        self._early = [reward.start for reward in self.reward_funcs if hasattr(reward, "start")]

    def _setup_tokens(self) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        self.family = family_of(policy.config)
        self.stop_ids = sorted(set(self.eos_token_ids))
        # Not the head's shape: under ZeRO-3 a partitioned weight has none.
        vocabulary = policy.config.get_text_config().vocab_size
        self.banned_ids = self.family.banned_ids(self._tokenizer, vocabulary, set(self.stop_ids))
        self.image_token_id = self._tokenizer.convert_tokens_to_ids(self.family.image_token)
        ban_tokens(policy.get_base_model() if hasattr(policy, "get_base_model") else policy, self.banned_ids)
        if self.ref_model is not None:
            ban_tokens(self.accelerator.unwrap_model(self.ref_model), self.banned_ids)

    def _setup_rollouts(
        self,
        args: VTGRPOConfig,
        environment: Callable[[], Environment] | None,
        backend: Backend | None,
    ) -> None:
        self.features = ImageFeatures(self.processing_class.image_processor)
        sight = self.family.sight(self.processing_class.image_processor)
        environment = environment or make_environment(args.environment, args.environment_args, sight)
        self.use_vllm = use_vllm = args.use_vllm
        self._warn_of_shrunk_pictures(environment().max_image_pixels)
        self.runner = RolloutRunner(
            environment,
            backend or (vllm_backend(self, environment()) if use_vllm else hf_backend(self)),
            ChatEncoder(self._tokenizer, self.family, self.features),
            self.stop_ids,
            Limits(args.max_turn_tokens, args.max_completion_length, args.vllm_max_model_length if use_vllm else None),
        )

    def _warn_of_shrunk_pictures(self, shown: int | None) -> None:
        allowed = self.processing_class.image_processor.size["longest_edge"]
        if shown is not None and shown > allowed:
            logger.warning(
                f"The image processor shrinks pictures to {allowed} pixels, and the environment shows up to {shown}: "
                f"a larger picture would be shown smaller than the environment thinks. Set max_pixels: {allowed} in "
                f"environment_args, or raise the processor's limit."
            )

    @contextmanager
    def generation_model(self) -> Iterator[nn.Module]:
        """The policy, gathered from its shards and with gradient checkpointing off. A collective."""
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            unsharded(self.model_wrapped, not fsdp or bool(fsdp.reshard_after_forward)),
        ):
            yield policy

    # The seam: one generation batch from rows to the dictionary that TRL's loss reads.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = self._mode()
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        sampling = self.args.dynamic_sampling if mode == "train" else "off"
        self._seconds = Counter(dict.fromkeys(PHASES, 0.0))
        self.features.clear()
        self.forward.forget()
        groups: list[Group] = []
        left_out: list[Group] = []
        if sampling == "refill":
            groups, left_out = self.refiller.collect(inputs, group_size)
        rollouts = [one for group in groups for one in group.rollouts] or self._roll_out(inputs, group_size)
        with self._phase("logprob"):
            batch = pack(
                rollouts,
                self.features,
                pad_id=self._tokenizer.pad_token_id,
                image_token_id=self.image_token_id,
                device=self.accelerator.device,
                pad_to_multiple_of=self.pad_to_multiple_of,
                share_images=self.args.share_images,
            )
            args = self.args
            chunk = args.per_device_train_batch_size if mode == "train" else args.per_device_eval_batch_size
            self.recorder.add_numbers(mode, add_logprobs(self, batch, chunk))
        groups = groups or self._score(rollouts, group_size)  # only now: a judge has had all this time
        set_advantages(self, groups, group_size)
        self._finish_batch(batch, groups, sampling)
        self._record(groups, left_out, mode)
        return batch

    def make_groups(self, inputs: list[dict[str, Any]], group_size: int) -> list[Group]:
        """Rollouts and scores of rows that the sampler has repeated ``group_size`` times. A collective."""
        return self._score(self._roll_out(inputs, group_size), group_size)

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.progress.enter(name)
        start = time.perf_counter()
        yield
        self.progress.enter("update")
        self._seconds[f"time/{name}_seconds"] += time.perf_counter() - start

    def _roll_out(self, inputs: list[dict[str, Any]], group_size: int) -> list[Rollout]:
        greedy = self._mode() == "eval" and self.args.eval_greedy
        settings = SamplingSettings(
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=0 if greedy else self.top_k,
            min_p=None if greedy else self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        most = self.runner.environment().max_pictures
        rows = [episode_row(row, most) for row in inputs[::group_size]]  # the sampler repeats each row side by side
        with self._phase("rollout"):
            return self.runner.run(rows, group_size, settings, self._start_judges)

    def _start_judges(self, rollout: Rollout) -> None:
        for start in self._early:
            start(rollout)

    def _score(self, rollouts: list[Rollout], group_size: int) -> list[Group]:
        with self._phase("score"):
            groups = score_groups(self, rollouts, group_size)
        self._take_logged(self._mode())
        return groups

    def _finish_batch(self, batch: dict[str, Any], groups: list[Group], sampling: str) -> None:
        """Advantages; and the loss, never the attention, taken from dropped groups and from truncated episodes."""
        dropped = without_loss(groups, sampling)
        share = effective_share(self, dropped)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        unused = dropped.clone()
        if self.mask_truncated_completions:
            unused |= torch.tensor([rollout.status is RolloutStatus.TRUNCATED for rollout in rollouts])
        batch["tool_mask"] = batch["tool_mask"] * (~unused).to(batch["tool_mask"].device).unsqueeze(1)
        device = batch["tool_mask"].device
        batch["advantages"] = torch.cat([group.advantage for group in groups]).to(device)
        batch["loss_scale"] = torch.full((len(rollouts),), 1 / share if share else 1.0)  # read on the CPU
        loss_tokens = loss_mask(batch).sum()
        batch["num_items_in_batch"] = self.accelerator.gather(loss_tokens).sum()
        self.recorder.add_numbers(self._mode(), {"groups/effective_share": share})

    def _take_logged(self, mode: str) -> None:
        """What reward functions gave to ``log_metric``; TRL would collect it in code we replace."""
        self.recorder.add_numbers(mode, {name: mean(values) for name, values in self._pending_metrics.items()})
        self._pending_metrics.clear()

    def _record(self, groups: list[Group], left_out: list[Group], mode: str) -> None:
        self.last_rollouts = [rollout for group in groups for rollout in group.rollouts]
        self.recorder.last_records = self.recorder.add_groups(mode, groups)
        self.recorder.add_groups(mode, left_out)
        self.recorder.add_numbers(mode, self._seconds)
        if mode == "train":
            made = [rollout for group in (*groups, *left_out) for rollout in group.rollouts]
            tokens = sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in made)
            self.state.num_input_tokens_seen += sum(gather_object([tokens]))
        self.transcripts.add(mode, groups, self.recorder.last_records)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        generated = len(self.recorder.numbers_of("train", PHASES[0]))
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        inside = sum(sum(self.recorder.numbers_of("train", name)[generated:]) for name in PHASES)
        self.recorder.add_numbers("train", {"time/update_seconds": time.perf_counter() - start - inside})
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our means, over all processes, to what TRL logs. Called on every process."""
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        numbers = self.recorder.take(mode, count_rows_once=mode == "eval" and self.num_generations_eval == 1)
        numbers |= self.transcripts.write(mode)
        logs.update({prefix + name: value for name, value in numbers.items()})
        super().log(logs, start_time)
        self.transcripts.show(mode)
