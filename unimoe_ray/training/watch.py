"""Watches a run's metrics for the ways in which mixtures of experts fail, and says in words what it sees.

The signatures: a router that collapses onto one expert (Shazeer et al., arXiv 1701.06538, section 4), experts that
die, loads of high variance, one modality that gets worse while the others improve, and a loss that diverges.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from unimoe_ray.config.training import WatchConfig

SIGNATURES = ("collapse", "dead", "imbalance", "validation", "divergence")
# Validations in a row that must agree: each is over the same few samples, whose loss wavers.
VALIDATIONS = 3
# A condition is gone only when its value is clearly back; else it would be said again and again at its threshold.
BACK = 0.9
# The loss of a run that ends near zero wavers by multiples of itself: a divergence is also this part of where it began.
OF_FIRST_LOSS = 0.05
NAMED_EXPERTS = 6
# Nats per token: what the validation loss of a few samples wavers by when it is near zero.
MIN_RISE = 0.05
BALANCE = "a balance coefficient (model.moe.balance_coef)"


@dataclass(frozen=True)
class Finding:
    """Something to be said once. ``over``: it is gone again. since: the first step of what is said.

    layer and experts: indices, as in ``metrics.jsonl`` (the text counts layers from 1, as the report does); group: a
    modality group
    """

    run: str
    step: int
    signature: str
    since: int
    text: str
    over: bool = False
    layer: int | None = None
    experts: tuple[int, ...] = ()
    group: str | None = None

    def line(self) -> dict[str, Any]:
        """For ``findings.jsonl``: without what it has not."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != ()}


@dataclass
class _Alarm:
    """Begins when its condition held ``patience`` times in a row, ends when the condition was clearly gone as often."""

    active: bool = False
    held: int = 0
    since: int = 0

    def observe(self, step: int, on: bool, off: bool, patience: int) -> bool | None:
        """True: begins now; False: ends now; None: nothing to say."""
        changes = off if self.active else on
        if changes and not self.held:
            self.since = step
        self.held = self.held + 1 if changes else 0
        if self.held < patience:
            return None
        self.active, self.held = not self.active, 0
        return self.active


class Watch:
    """Fed with the lines of ``metrics.jsonl`` of one run, in order; after a restart, with the earlier ones again.

    experts: what fills each expert slot, for the texts; top_k: experts of a token
    """

    def __init__(self, config: WatchConfig, experts: list[str], top_k: int):
        self.config, self.experts, self.top_k = config, experts, top_k
        self._alarms: dict[tuple, _Alarm] = {}
        self._losses: deque[tuple[int, float]] = deque(maxlen=config.patience)
        self._first_loss: float | None = None
        self._lowest = math.inf
        self._best: dict[str, tuple[int, dict[str, float]]] = {}  # step and all losses when a group's was lowest

    def step(self, line: dict[str, Any]) -> list[Finding]:
        """What this step's line makes worth saying."""
        findings = [*self._divergence(line)]
        if line.get("expert_load"):
            findings += [*self._layers(line), *self._dead(line)]
        if line.get("validation"):
            findings += self._validation(line)
        return findings

    def _layers(self, line: dict[str, Any]) -> Iterator[Finding]:
        step, config = line["step"], self.config
        most = math.sqrt(max(len(self.experts) / self.top_k - 1, 0))
        for layer, (share, expert, cv) in enumerate(
            zip(line["busiest_share"], line["busiest_expert"], line["load_cv"], strict=True)
        ):
            alarm, said = self._observe(
                ("collapse", layer), step, share >= config.collapse_share, share < BACK * config.collapse_share
            )
            if said is not None:
                text = f"layer {layer + 1} no longer sends nearly all of its tokens to one expert"
                if said:
                    to = f"{'' if self.top_k == 1 else 'first '}to {self._name(expert)}"
                    text = (
                        f"layer {layer + 1} sends {_percent(share)} of its tokens {to} since step {alarm.since}; "
                        f"{BALANCE} or a lower rate of the router helps"
                    )
                yield self._finding(line, "collapse", alarm, said, text, layer=layer, experts=(expert,))
            uneven = cv / most if most else 0.0
            # A collapse is said already: that its loads are uneven is no news.
            on = uneven >= config.imbalance and not alarm.active
            alarm, said = self._observe(("imbalance", layer), step, on, uneven < BACK * config.imbalance)
            if said is not None:
                load = line["expert_load"][layer]
                busy, idle = load.index(max(load)), load.index(min(load))
                text = f"layer {layer + 1} has evener loads again (coefficient of variation {cv:.2f})"
                if said:
                    text = (
                        f"layer {layer + 1} has uneven loads since step {alarm.since}: {_percent(load[busy])} of its "
                        f"slots go to {self._name(busy)}, {_percent(load[idle])} to {self._name(idle)} (coefficient of "
                        f"variation {cv:.2f}, at most {most:.2f}); {BALANCE} evens them"
                    )
                yield self._finding(line, "imbalance", alarm, said, text, layer=layer, experts=(busy,) if said else ())

    def _dead(self, line: dict[str, Any]) -> Iterator[Finding]:
        """One finding for all experts of a layer that die in the same step."""
        step = line["step"]
        idle = {(layer, expert): steps for layer, expert, steps in line["dead_experts"]}
        long = {place for place, steps in idle.items() if steps >= self.config.dead_steps}
        known = {key[1:] for key in self._alarms if key[0] == "dead"}
        changed: dict[tuple[int, bool], list[tuple[int, _Alarm]]] = {}
        for place in sorted(long | known):
            alarm = self._alarms.setdefault(("dead", *place), _Alarm())
            patience = self.config.patience if alarm.active else 1
            said = alarm.observe(step, place in long, place not in idle, patience)
            if said:
                alarm.since = step - idle[place] + 1
            if said is not None:
                changed.setdefault((place[0], said), []).append((place[1], alarm))
            if said is False:
                del self._alarms["dead", *place]
        for (layer, said), experts in changed.items():
            numbers = tuple(expert for expert, _ in experts)
            names = [self._name(expert) for expert in numbers[:NAMED_EXPERTS]]
            if more := len(numbers) - len(names):
                names.append(f"{more} more")
            first = min((alarm for _, alarm in experts), key=lambda alarm: alarm.since)
            text = (
                f"{_listed(names)} of layer {layer + 1} had no token since step {first.since}; {BALANCE} or fewer "
                "experts (model.moe.slots) helps"
                if said
                else f"{_listed(names)} of layer {layer + 1} {'get' if len(numbers) > 1 else 'gets'} tokens again"
            )
            yield self._finding(line, "dead", first, said, text, layer=layer, experts=numbers)

    def _divergence(self, line: dict[str, Any]) -> Iterator[Finding]:
        step, loss = line["step"], line["loss"]
        finite = math.isfinite(loss)
        if finite:
            self._losses.append((step, loss))
            self._first_loss = loss if self._first_loss is None else self._first_loss
        middle = limit = math.inf
        if len(self._losses) == self._losses.maxlen:
            middle = median(value for _, value in self._losses)
            self._lowest = min(self._lowest, middle)
        lowest = self._lowest
        if math.isfinite(lowest):
            limit = max(self.config.divergence * lowest, lowest + OF_FIRST_LOSS * self._first_loss)
        diverged = math.isfinite(middle) and middle > limit
        calm = finite and (math.isinf(limit) or middle < BACK * limit)
        alarm = self._alarms.setdefault(("divergence",), _Alarm())
        said = alarm.observe(step, diverged or not finite, calm, self.config.patience if alarm.active else 1)
        if said is None:
            return
        helps = "a lower learning rate or a longer warm-up helps"
        if not said:
            text = f"the loss is back at {loss:.3g}"
        elif not finite:
            text = f"the loss is {loss} since step {step}; {helps}"
        else:
            alarm.since = next(at for at, value in self._losses if value > limit)
            times = f"{middle / lowest:.1f} times its lowest ({lowest:.3g})"
            text = f"the loss is {middle:.3g}, {times}, since step {alarm.since}; {helps}"
        yield self._finding(line, "divergence", alarm, said, text)

    def _validation(self, line: dict[str, Any]) -> Iterator[Finding]:
        step, now = line["step"], line["validation"]
        for group, loss in now.items():
            if group not in self._best or loss < self._best[group][1][group]:
                self._best[group] = step, now
            best_step, best = self._best[group]
            rise, wanted = loss - best[group], max(self.config.validation_rise * best[group], MIN_RISE)
            ratios = [now[other] / best[other] for other in now if other != group and best.get(other, 0) > 0]
            # The geometric mean, of which no group is the more for being the harder.
            others = math.prod(ratios) ** (1 / max(len(ratios), 1))
            on = rise >= wanted and bool(ratios) and others < 1
            alarm, said = self._observe(("validation", group), step, on, rise < wanted / 2, VALIDATIONS)
            if said is not None:
                text = f"the validation loss of {group} is down again, at {loss:.3g}"
                if said:
                    text = (
                        f"the validation loss of {group} rises while the others fall: {best[group]:.3g} at step "
                        f"{best_step}, {loss:.3g} now, the others {_percent(1 - others)} lower than then; more weight "
                        "for its tasks or a lower rate for its connector helps"
                    )
                yield self._finding(line, "validation", alarm, said, text, group=group)

    def _observe(
        self, key: tuple, step: int, on: bool, off: bool, patience: int | None = None
    ) -> tuple[_Alarm, bool | None]:
        alarm = self._alarms.setdefault(key, _Alarm())
        return alarm, alarm.observe(step, on, off, patience or self.config.patience)

    def _name(self, expert: int) -> str:
        return f"expert {expert} ({self.experts[expert]})"

    @staticmethod
    def _finding(line: dict[str, Any], signature: str, alarm: _Alarm, said: bool, text: str, **where: Any) -> Finding:
        return Finding(line["run"], line["step"], signature, alarm.since, text, not said, **where)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
