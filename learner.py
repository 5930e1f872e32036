"""The learner: the optimizer with its learning rate schedule, loss scaling for fp16, and the running average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

import texforce
from texforce.config import TrainConfig, num_optimizer_steps

MAX_SKIPPED_STEPS = 20  # in a row in fp16: by then the loss scale has fallen a millionfold


def finds_micro_batch(config: TrainConfig, device: torch.device) -> bool:
    """Whether micro-batches begin at the size of sampling's batches, and are halved whenever memory runs out.

    On a CPU lack of memory is no error, it kills.
    """
    return config.micro_batch == "auto" and device.type == "cuda"


class Learner:
    """Optimizer with its learning rate schedule, loss scaling for fp16, and the running average of the adapter."""

    def __init__(self, parameters: list[nn.Parameter], config: TrainConfig) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        self.lr_scheduler = get_scheduler(
            name,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=num_optimizer_steps(config),
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=config.mixed_precision == "fp16")
        self.num_skipped = 0  # steps in a row
        self.finds_micro_batch = finds_micro_batch(config, parameters[0].device)
        self.micro_batch_size = config.sample_batch_size if self.finds_micro_batch else config.micro_batch_size
        self.ema = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None

    def step(self, parameters: list[nn.Parameter], max_grad_norm: float) -> float:
        """One optimizer step from the gradients accumulated; returns their norm.

        Raises:
            DivergedError: the gradient is not finite. In fp16 the step is skipped instead, and the loss scale lowered, so
                often as lowering it can help.
        """
        # The first loss that it scales sets it up, and a process whose pairs are all another's has none.
        self.scaler.scale(torch.zeros((), device=parameters[0].device))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self.num_skipped = 0 if norm.isfinite() else self.num_skipped + 1
        if self.num_skipped > (MAX_SKIPPED_STEPS if self.scaler.is_enabled() else 0):
            raise texforce.DivergedError("the gradient is not finite; lower --learning-rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if not self.num_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(parameters)
        return norm.item()

    def set_num_steps(self, number: int) -> None:
        """Go on with the learning rate as it is after so many optimizer steps."""
        self.lr_scheduler.last_epoch = number
        rates = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        self.lr_scheduler._last_lr = [base * factor(number) for base, factor in rates]
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler._last_lr, strict=True):
            group["lr"] = rate

    @contextlib.contextmanager
    def averaged(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Within it, the parameters hold their running average, if one is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)
