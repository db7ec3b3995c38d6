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
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from vt_trl.chat import ChatEncoder
from vt_trl.config import VTGRPOConfig
from vt_trl.data import episode_row
from vt_trl.envs import Environment, make_environment
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.fused_head import labelled_positions_only
from vt_trl.generation.base import Backend, SamplingSettings
from vt_trl.generation.hf import HFBackend
from vt_trl.metrics import RolloutRecord, mean
from vt_trl.packing import pack
from vt_trl.passes import add_logprobs
from vt_trl.recorder import Recorder
from vt_trl.rewards import group_advantages, group_penalty, make_rewards
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.token_ban import ban_tokens
from vt_trl.types import Rollout, RolloutStatus

logger = logging.getLogger(__name__)


class VTGRPOTrainer(GRPOTrainer):
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
        # TRL would build an engine of its own here; ours has other needs (see vt_trl/generation/vllm.py).
        use_vllm, args.use_vllm = args.use_vllm, False
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
            args.use_vllm = use_vllm
        self.reward_func_names = list(args.rewards) if reward_funcs is None else self.reward_func_names
        self._correct_column = self._find_correctness(args)
        self.recorder = Recorder(self.accelerator, self.reward_func_names)
        self._open_judges()
        self.last_rollouts: list[Rollout] = []
        self._setup_tokens()
        self._setup_rollouts(args, environment, backend, use_vllm)

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
        use_vllm: bool,
    ) -> None:
        self.features = ImageFeatures(self.processing_class.image_processor)
        environment = environment or make_environment(args.environment, args.environment_args)
        self.use_vllm = use_vllm
        self._warn_of_shrunk_pictures(environment().max_image_pixels)
        self.runner = RolloutRunner(
            environment,
            backend or (self._vllm_backend(environment()) if use_vllm else self._hf_backend()),
            ChatEncoder(self._tokenizer, self.family, self.features),
            self.stop_ids,
            Limits(args.max_turn_tokens, args.max_completion_length, args.vllm_max_model_length if use_vllm else None),
        )

    def _warn_of_shrunk_pictures(self, shown: int | None) -> None:
        allowed = self.processing_class.image_processor.size["longest_edge"]
        if shown is not None and shown > allowed:
            logger.warning(
                f"The image processor shrinks pictures to {allowed} pixels, and the environment shows up to {shown}: "
                f"a larger full view would have less than 4 times the tokens of its low view. Set "
                f"max_pixels: {allowed} in environment_args, or raise the processor's limit."
            )

    def _hf_backend(self) -> HFBackend:
        return HFBackend(
            self._generation_model,
            self.features,
            pad_id=self._tokenizer.pad_token_id,
            stop_ids=self.stop_ids,
            banned_ids=self.banned_ids,
            image_token_id=self.image_token_id,
            max_batch=self.args.generation_chunk,
        )

    def _vllm_backend(self, example: Environment) -> Backend:
        from vt_trl.generation.vllm import ColocatedEngine, VLLMBackend

        args = self.args
        self.vllm_generation = ColocatedEngine(
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            mode=args.vllm_mode,
            max_images=example.max_turns,
            max_image_tokens=self._largest_image_tokens(example.max_image_pixels),
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
        )
        return VLLMBackend(
            self.vllm_generation,
            image_token_id=self.image_token_id,
            eos_token_ids=self.stop_ids,
            banned_ids=self.banned_ids,
            weights_version=lambda: self.state.global_step,
        )

    def _largest_image_tokens(self, max_pixels: int | None) -> int:
        """Visual tokens of the largest picture the environment can show; vLLM's batch must hold one."""
        processor = self.processing_class.image_processor
        largest = min(max_pixels or math.inf, processor.size["longest_edge"])
        return math.ceil(largest / (processor.patch_size * processor.merge_size) ** 2)

    @contextmanager
    def _generation_model(self) -> Iterator[nn.Module]:
        """The policy, gathered from its shards and with gradient checkpointing off."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield policy

    # The seam: one generation batch from rows to the dictionary that TRL's loss reads.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        start = time.perf_counter()
        self.features.clear()
        rollouts = self._roll_out(inputs, group_size, mode)
        rolled = time.perf_counter()
        batch = pack(
            rollouts,
            self.features,
            pad_id=self._tokenizer.pad_token_id,
            image_token_id=self.image_token_id,
            device=self.accelerator.device,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        chunk = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        numbers = add_logprobs(self, batch, chunk)
        passed = time.perf_counter()
        scored = self._score(rollouts, group_size, mode)  # only now: a judge has had all this time
        numbers["time/score_seconds"] = time.perf_counter() - passed
        self._mask_unusable(batch, rollouts, scored["reward"], group_size)
        batch["advantages"] = scored["advantage"]
        loss_tokens = (batch["completion_mask"] * batch["tool_mask"]).sum()
        batch["num_items_in_batch"] = self.accelerator.gather(loss_tokens).sum()
        self._record(rollouts, scored, group_size, mode)
        self.last_rollouts = rollouts
        numbers |= {"time/rollout_seconds": rolled - start, "time/logprob_seconds": passed - rolled}
        self.recorder.add_numbers(mode, numbers)
        return batch

    def _roll_out(self, inputs: list[dict[str, Any]], group_size: int, mode: str) -> list[Rollout]:
        greedy = mode == "eval" and self.args.eval_greedy
        settings = SamplingSettings(
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=0 if greedy else self.top_k,
            min_p=None if greedy else self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        rows = [episode_row(row) for row in inputs[::group_size]]  # the sampler repeats each row side by side
        return self.runner.run(rows, group_size, settings, self._start_judges)

    def _start_judges(self, rollout: Rollout) -> None:
        for start in self._early:
            start(rollout)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        with labelled_positions_only():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _score(self, rollouts: list[Rollout], group_size: int, mode: str) -> dict[str, torch.Tensor]:
        """Parts (N, F), ``correct`` (N,) with NaN where undecided, penalty, reward, advantage (N,) of this process."""
        inputs = [{**rollout.row, "rollout": rollout} for rollout in rollouts]
        prompts = [[m.as_dict() for m in r.messages[: r.prompt_messages]] for r in rollouts]
        completions = [[m.as_dict() for m in r.messages[r.prompt_messages :]] for r in rollouts]
        everyone = self._calculate_rewards(inputs, prompts, completions, [r.completion_ids for r in rollouts])
        self._take_logged(mode)
        here = slice(self.accelerator.process_index * len(rollouts), None)
        parts = everyone[here][: len(rollouts)].float().cpu()
        correct = parts[:, self._correct_column]
        asked = torch.tensor([rollout.asked for rollout in rollouts])
        penalty = group_penalty(
            self.args.penalty, correct > 0.5, asked, group_size, self.args.penalty_theta, self.args.penalty_amount
        )
        # NaN in any part is a score nobody could give: the sum, and with it the group, stays unknown.
        reward = (parts * self.reward_weights.cpu()).sum(dim=1) - penalty
        all_rewards = self.accelerator.gather(reward.to(self.accelerator.device)).cpu()
        advantage = group_advantages(all_rewards, group_size, self.scale_rewards)[here][: len(rollouts)]
        return {
            "parts": parts,
            "correct": correct,
            "penalty": penalty,
            "reward": reward,
            "advantage": advantage,
        }

    def _mask_unusable(
        self, batch: dict[str, Any], rollouts: list[Rollout], reward: torch.Tensor, group_size: int
    ) -> None:
        """Take the loss, never the attention, from groups that could not be scored and from truncated episodes."""
        failed = reward.isnan().view(-1, group_size).any(dim=1).repeat_interleave(group_size)
        if self.mask_truncated_completions:
            failed |= torch.tensor([rollout.status is RolloutStatus.TRUNCATED for rollout in rollouts])
        batch["tool_mask"] = batch["tool_mask"] * (~failed).to(batch["tool_mask"].device).unsqueeze(1)

    def _take_logged(self, mode: str) -> None:
        """What reward functions gave to ``log_metric`` and ``log_extra``; TRL would collect it in code we replace."""
        self.recorder.add_numbers(mode, {name: mean(values) for name, values in self._pending_metrics.items()})
        if self.log_completions:
            for column, values in self._pending_extra_logs.items():
                self._logs["extra"][column].extend(gather_object(values))
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()

    def _record(self, rollouts: list[Rollout], scored: dict[str, torch.Tensor], group_size: int, mode: str) -> None:
        records = self.recorder.add_rollouts(mode, rollouts, scored, group_size)
        if mode == "train":
            tokens = sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts)
            self.state.num_input_tokens_seen += sum(gather_object([tokens]))
        if self.log_completions:
            self._log_completions(rollouts, records)

    def _log_completions(self, rollouts: list[Rollout], records: list[RolloutRecord]) -> None:
        """Fill the table that TRL prints and writes when ``log_completions`` is set."""
        prompts = [[message.as_dict() for message in r.messages[: r.prompt_messages]] for r in rollouts]
        completions = [[message.as_dict() for message in r.messages[r.prompt_messages :]] for r in rollouts]
        everyone = gather_object(records)
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        for name in self.reward_func_names:
            self._logs["rewards"][name].extend(record.parts[name] for record in everyone)
        self._logs["advantages"].extend(record.advantage for record in everyone)
        for column in ("status", "asked", "penalty"):
            self._logs["extra"][column].extend(getattr(record, column) for record in everyone)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        phases = [f"time/{name}_seconds" for name in ("rollout", "logprob", "score")]
        generated = len(self.recorder.numbers_of("train", phases[0]))
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        inside = sum(sum(self.recorder.numbers_of("train", name)[generated:]) for name in phases)
        self.recorder.add_numbers("train", {"time/update_seconds": time.perf_counter() - start - inside})
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our means, over all processes, to what TRL logs. Called on every process."""
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        numbers = self.recorder.take(mode, count_rows_once=mode == "eval" and self.num_generations_eval == 1)
        logs.update({prefix + name: value for name, value in numbers.items()})
        super().log(logs, start_time)
