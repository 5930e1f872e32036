"""The optimizer of a training, its learning rate, loss scaling and running average; saved and restored exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .config import TrainConfig, num_optimizer_steps
from .errors import DivergedError

MAX_SKIPPED_STEPS = 20  # in a row in fp16: by then the loss scale has fallen a millionfold


def finds_micro_batch(config: TrainConfig, device: torch.device) -> bool:
    """Whether micro-batches begin at the size of sampling's batches, and are halved whenever memory runs out.

    On a CPU a lack of memory is no error, it kills the process.
    """
    return config.micro_batch == "auto" and device.type == "cuda"


class Learner:
    """The optimizer with its learning rate schedule, loss scaling for fp16, and the running average of the adapter."""

    def __init__(self, parameters: list[nn.Parameter], config: TrainConfig) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.parameters, self.max_grad_norm = parameters, config.max_grad_norm
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

    def step(self) -> float:
        """One optimizer step with the gradients accumulated; returns their norm.

        Raises:
            DivergedError: the gradient is not finite. In fp16 the step is skipped instead, and the loss scale lowered, as
                often as lowering it can help.
        """
        # The scaler sets itself up at its first scale(), which a process without pairs of its own never calls.
        self.scaler.scale(torch.zeros((), device=self.parameters[0].device))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.num_skipped = 0 if norm.isfinite() else self.num_skipped + 1
        if self.num_skipped > (MAX_SKIPPED_STEPS if self.scaler.is_enabled() else 0):
            raise DivergedError("the gradient is not finite; lower --learning-rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if not self.num_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return norm.item()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the running average into the parameters, if one is kept, and take it out again at the end."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": {str(i): dict(self.optimizer.state[item]) for i, item in enumerate(self.parameters)},
            "num_steps": self.lr_scheduler.last_epoch,
            "scaler": self.scaler.state_dict(),
            "num_skipped": self.num_skipped,
            "micro_batch_size": self.micro_batch_size,
            "ema": None
            if self.ema is None
            else {"step": self.ema.optimization_step, **{str(i): item for i, item in enumerate(self.ema.shadow_params)}},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as it was; rates and decay are the configuration's, which may have been changed by force."""
        self.optimizer.state.clear()
        for i, parameter in enumerate(self.parameters):
            moments = state["optimizer"].get(str(i))
            if moments:  # none before the first step; the step count stays on the CPU, as AdamW has it
                self.optimizer.state[parameter] = {
                    name: tensor.clone() if name == "step" else tensor.to(parameter.device, copy=True)
                    for name, tensor in moments.items()
                }
        if self.ema is not None and state["ema"] is not None:
            for i, average in enumerate(self.ema.shadow_params):
                average.copy_(state["ema"][str(i)])
            self.ema.optimization_step = state["ema"]["step"]
        self._set_num_steps(state["num_steps"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.num_skipped = state["num_skipped"]
        if self.finds_micro_batch:  # as it was found before: another size rounds otherwise
            self.micro_batch_size = min(self.micro_batch_size, state["micro_batch_size"])

    def _set_num_steps(self, number: int) -> None:
        """Go on with the learning rate as it is after so many optimizer steps."""
        self.lr_scheduler.last_epoch = number
        rates = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        self.lr_scheduler._last_lr = [base * factor(number) for base, factor in rates]
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler._last_lr, strict=True):
            group["lr"] = rate
