"""An optimizer for tiny models made in code, which with Adam alone stay at chance for hundreds of steps."""

from __future__ import annotations

import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32: steps along the orthogonalised momentum of each matrix.

    torch's own computes in bfloat16, which processors without it emulate at a tenth of the speed.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight)).lerp_(weight.grad, 0.05)
                update = weight.grad.lerp(momentum, 0.95)
                wide = update if update.shape[0] <= update.shape[1] else update.T
                wide = wide / (wide.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz, with the coefficients of the original
                    square = wide @ wide.T
                    wide = 3.4445 * wide + (-4.775 * square + 2.0315 * square @ square) @ wide
                update = wide if update.shape[0] <= update.shape[1] else wide.T
                weight.add_(update, alpha=-group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5)


class MuonAndAdam:
    """Muon for the matrices of a model, AdamW for its embeddings and vectors, each with its own learning rate."""

    def __init__(
        self,
        model: torch.nn.Module,
        matrix_rate: float,
        other_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
    ):
        def is_matrix(name: str, weight: torch.Tensor) -> bool:
            return weight.ndim == 2 and "embed" not in name

        matrices = [weight for name, weight in model.named_parameters() if is_matrix(name, weight)]
        others = [weight for name, weight in model.named_parameters() if not is_matrix(name, weight)]
        self._parameters = list(model.parameters())
        self._rates = (matrix_rate, other_rate)
        adam = torch.optim.AdamW(others, lr=other_rate, betas=betas, weight_decay=weight_decay)
        self._optimizers = (Muon(matrices, {"lr": matrix_rate}), adam)

    def step(self, scale: float) -> None:
        """One update at ``scale`` times the learning rates, the gradient's norm clipped to 1; clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
