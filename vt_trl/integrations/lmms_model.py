"""A trained policy as a model of lmms-eval 0.7, played by the rollout loop that trains, greedy in every turn.

    lmms-eval --model vt_trl --model_args pretrained=runs/mine-export,policy=two-turn --tasks chartqa

lmms-eval finds it by its entry point (:mod:`vt_trl.integrations.lmms_entry`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from vt_trl.errors import ConfigError, DataError
from vt_trl.integrations.player import Player
from vt_trl.integrations.questions import Tally, lifted, plain_answer

_AUTO_BATCH = {False: 8, True: 256}  # questions at a time with batch_size=auto; True: vLLM


class VisionThinkModel(lmms):
    """lmms-eval's chat interface in front of :class:`vt_trl.inference.PolicyModel`.

    Args:
        pretrained: a folder or a Hub name, full weights or a merged export.
        policy: ``two-turn``, ``always-full`` and the others of :mod:`vt_trl.policies`; default: as trained.
        environment_args: settings of its environment, as JSON or a mapping; default: as trained.
        batch_size: questions that are played together; ``auto``: 8, with vLLM 256. ``max_batch_size`` bounds it.
        max_pictures: most pictures in one question.
        unbox: of an answer in ``\\boxed{}`` give its content.
        seed: draws the questions of ``share=...``.
        settings: those of PolicyModel; ``backend`` is ``auto`` here.

    Raises:
        ConfigError: for a setting that is unknown or cannot work, or a model that does not load.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        policy: str | None = None,
        environment_args: str | Mapping[str, Any] | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_pictures: int = 8,
        unbox: bool = True,
        seed: int = 0,
        **settings: Any,
    ):
        super().__init__()
        self.player: Player | None = Player(pretrained, policy, environment_args, max_pictures, seed, **settings)
        self.unbox = unbox
        self.batch_size = _batch_size(batch_size, max_batch_size, self.player.model.uses_vllm)
        self._said: set[str] = set()
        limits = self.player.model.limits
        logger.info(
            f"vt_trl: {pretrained} plays {self.player.policy}, greedy, at most {limits.turn} tokens a turn and "
            f"{limits.completion} in all"
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in their order; a question that cannot be shown is answered with "" and counted."""
        if self.player is None:
            raise RuntimeError("The model was cleaned up already; load it again.")
        self.player.tally = Tally()
        results: list[GenerationResult] = []
        with tqdm(total=len(requests), desc="vt_trl", disable=self.rank != 0) as bar:
            for start in range(0, len(requests), self.batch_size):
                part = requests[start : start + self.batch_size]
                outcomes = self.player.play([self._row(one) for one in part])
                results += [self._result(one, outcome) for one, outcome in zip(part, outcomes, strict=True)]
                bar.update(len(part))
        self._report()
        return results

    def _row(self, request: Instance) -> dict[str, Any] | DataError:
        _, doc_to_messages, settings, doc_id, task, split = request.args
        self._say_lifted(task, settings)
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return self.player.row(messages, f"{task}/{split}/{doc_id}")

    def _result(self, request: Instance, outcome: Any) -> GenerationResult:
        if isinstance(outcome, DataError):
            return GenerationResult("", TokenCounts())
        text = plain_answer(outcome, self.unbox)
        self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)
        return GenerationResult(text, TokenCounts(len(outcome.prompt_ids), sum(outcome.loss_mask)))

    def _say_lifted(self, task: str, settings: Mapping[str, Any]) -> None:
        unused = lifted(settings)
        if unused and task not in self._said:
            self._said.add(task)
            logger.warning(
                f"vt_trl: {task} asks for {', '.join(f'{name}={value!r}' for name, value in unused.items())}; this is "
                f"lifted, since it would cut or change the reasoning. The limits are those of the policy "
                f"(max_turn_tokens, max_completion_length), and every turn is greedy."
            )

    def _report(self) -> None:
        tally = self.player.tally
        logger.info(f"vt_trl: {tally.summary()}")
        if tally.refused:
            logger.warning(f"vt_trl: {tally.refusals()}")
        played = len(tally.visual_tokens)
        more = (
            {"visual_tokens": sum(tally.visual_tokens) / played, "request_rate": tally.asked / played}
            if played
            else {}
        )
        speed = tally.generated_tokens / tally.seconds if tally.seconds else 0.0
        more |= {"not_shown": len(tally.refused), "rank": self.rank}
        log_metrics(tally.seconds, tally.generated_tokens, speed, additional_metrics=more)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "vt_trl answers questions after reasoning; use a task with `output_type: generate_until`."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("vt_trl plays the rounds of an episode itself; use a task with `generate_until`.")

    def clean(self) -> None:
        """Let go of the weights, so that a local judge has the memory."""
        self.player = None
        super().clean()


def _batch_size(wanted: int | str, most: int | None, uses_vllm: bool) -> int:
    text = str(wanted)
    if text.split(":")[0] == "auto":
        size = _AUTO_BATCH[uses_vllm]
    elif text.isdecimal() and int(text) > 0:
        size = int(text)
    else:
        raise ConfigError(f"batch_size is {wanted!r}; it counts questions, so set 1 or more, or auto.")
    return size if most is None else max(1, min(size, int(most)))
