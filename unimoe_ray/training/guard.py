"""Steps whose loss or gradient is not finite or explodes: found before the update, by all ranks alike."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

import torch
import torch.distributed as dist

from unimoe_ray.config import Config
from unimoe_ray.config.elastic import ElasticConfig
from unimoe_ray.errors import UnimoeError
from unimoe_ray.training.interrupt import PlannedRestart
from unimoe_ray.training.recovery import METRICS, bad_steps, read_lines

WINDOW, ENOUGH = 20, 5


class Guard:
    """known: the steps that the run went back from earlier, whose data are left out now; losses: of the steps before
    the first one to come. Steps count from 1."""

    def __init__(self, config: ElasticConfig, known: dict[int, str], losses: list[float]):
        self._config, self._known = config, known
        self._bad = set(known)
        good = [loss for loss in losses if math.isfinite(loss)]
        self._losses, self._highest = deque(good, maxlen=WINDOW), max(good, default=0.0)

    @classmethod
    def of_run(cls, config: Config, run: str, done: int) -> Guard:
        """From what is written down of the run, whose first ``done`` steps are done; on all ranks, which must agree."""
        found: list = [None]
        if dist.get_rank() == 0:
            lines = read_lines(config.run_dir / METRICS, run)
            losses = [line["loss"] for line in lines if line["step"] <= done and "skipped" not in line]
            found = [(bad_steps(config.run_dir, run), losses)]
        dist.broadcast_object_list(found)
        return cls(config.training.elastic, *found[0])

    def before_update(self, engine, step: int, loss: float) -> str | None:
        """``loss``: of the step, the same on all ranks. Why its update is left out, if it is: the engine then makes
        none. Raises as ``_act`` does."""
        reason = self._judge(loss)
        if step in self._known:
            reason = f"left out: {self._known[step]}"
        elif reason is not None:
            self._act(step, reason)
        if reason is None:
            self._losses.append(loss)
            self._highest = max(self._highest, loss)
            return None
        void_gradients(engine)
        return reason

    def after_update(self, engine, step: int) -> str | None:
        """Why the engine made none, if it did not: it looks at the norm of the gradients itself."""
        if not engine.optimizer.overflow or step in self._bad:
            return None
        reason = "the gradient is not finite"
        self._act(step, reason)
        return reason

    def _judge(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self._losses) >= ENOUGH:
            middle = median(self._losses)
            if loss > self._config.explosion * middle and loss > self._highest:
                return f"the loss is {loss:.3g}, {loss / max(middle, 1e-12):.0f} times the median of the last steps"
        return None

    def _act(self, step: int, reason: str) -> None:
        """Raises UnimoeError where the run is to stop, PlannedRestart where it is to go back."""
        self._bad.add(step)
        row = next(n for n in range(len(self._bad) + 1) if step - n not in self._bad)
        if self._config.bad_loss == "stop":
            raise UnimoeError(f"step {step}: {reason} (training.elastic.bad_loss is stop)")
        if row >= self._config.max_bad_steps:
            raise UnimoeError(
                f"step {step}: {reason}, and the {row} steps up to it were bad (training.elastic.max_bad_steps); "
                "a lower learning rate or a longer warm-up helps"
            )
        if self._config.bad_loss == "rewind":
            raise BadStep(step, reason)


class BadStep(PlannedRestart):
    """The run goes back to its last saved state, to come past this step without it."""

    def __init__(self, step: int, reason: str):
        super().__init__("rewind", f"step {step}: {reason}; back to the last saved state")
        self.step, self.reason = step, reason

    def __reduce__(self):
        return BadStep, (self.step, self.reason)


def void_gradients(engine) -> None:
    """Have the engine's next step clear its gradients without an update, as it does when their norm is not finite."""
    for gradients in engine.optimizer.averaged_gradients.values():
        for gradient in gradients or ():
            if gradient is not None and gradient.numel():
                gradient.fill_(torch.nan)
                return
