"""Before and after in one table, each number with an interval, and a sentence that says whether the change is real."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .functional.calibration import events
from .functional.resampling import Estimate
from .metrics import MetricCollection, bootstrap, compare
from .metrics.collection import named_numbers


SAME = 1e-6  # nats: less is rounding
FEW = 30  # rows: a bootstrap interval over fewer is too narrow to be believed
MANY = 1e6  # rows: nobody labels more to settle a difference so small
TITLES = {"accuracy": "Accuracy", "nll": "NLL (nats)", "brier": "Brier", "ece": "ECE", "smooth_ece": "Smooth ECE"}


@dataclass(frozen=True)
class CalibrationReport:
    """What `evaluate_calibration` found. Fractions and nats; `change` is after minus before, on the same resamples."""

    num_rows: int
    num_resamples: int
    after: dict[str, Estimate]
    before: dict[str, Estimate] | None = None
    change: dict[str, Estimate] | None = None
    # (N,) confidence or event probability and (N,) whether it was right, after and before: what the diagram shows
    events: tuple[tuple[torch.Tensor, torch.Tensor], ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: each estimate as `{"value", "low", "high"}`, where the ends can be null."""
        record: dict[str, Any] = {"num_rows": self.num_rows, "num_resamples": self.num_resamples}
        for key in ("before", "after", "change"):
            if (estimates := getattr(self, key)) is not None:
                record[key] = {
                    name: {"value": estimate.value, "low": estimate.low, "high": estimate.high}
                    for name, estimate in estimates.items()
                }
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> CalibrationReport:
        """What `to_dict` gave; without the events, so without a figure."""
        estimates = {
            key: {name: Estimate(**estimate, num_rows=record["num_rows"]) for name, estimate in record[key].items()}
            for key in ("before", "after", "change")
            if key in record
        }
        return cls(record["num_rows"], record["num_resamples"], **estimates)

    @classmethod
    def from_metrics(cls, metrics: MetricCollection, *, num_resamples: int = 1000, seed: int = 0) -> CalibrationReport:
        """What streaming metrics have seen, with `Metric.interval` where there is one; without a figure.

        A test of calibration has two rows, `NAME` and `NAME_p_value`.
        """
        after = {}
        for name, value in named_numbers(metrics.compute()).items():
            try:
                after[name] = metrics.metrics[name].interval(num_resamples=num_resamples, seed=seed)
            except (KeyError, ValueError):  # of a p-value, and where the sums do not tell how rows differ
                after[name] = Estimate(value, None, None, metrics.num_rows)
        return cls(metrics.num_rows, num_resamples, after)

    def figure(self, *, title: str | None = None) -> Any:
        """The reliability diagram, before and after where there is a before: a `matplotlib.figure.Figure`."""
        from .plots import plot_reliability, plot_reliability_comparison, prepare_reliability

        if not self.events:
            raise ValueError("events: this report was read from a record, which has none; a figure needs them")
        after, *before = (prepare_reliability(scores, outcomes) for scores, outcomes in self.events)
        if before:
            return plot_reliability_comparison(before[0], after, title=title)
        return plot_reliability(after, title=title).figure

    def header(self) -> list[str]:
        """The columns' titles."""
        return ["Metric", "Before", "After", "Change"] if self.before else ["Metric", "Value"]

    def rows(self) -> list[list[str]]:
        """The table's cells, a row per metric."""
        if self.before is None:
            return [[TITLES.get(name, name), str(estimate)] for name, estimate in self.after.items()]
        return [
            [
                TITLES[name],
                str(self.before[name]),
                str(estimate),
                "{:+.4f} [{:+.3f}, {:+.3f}]".format(*self.change[name][:3]),
            ]
            for name, estimate in self.after.items()
        ]

    def to_markdown(self) -> str:
        """The table and the verdict, for a README or a model card."""
        header = self.header()
        lines = [header, [":---", *["---:"] * (len(header) - 1)], *self.rows()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (table, self.note(), self.verdict()) if part)

    def note(self) -> str:
        """How many rows, and what the brackets are."""
        if all(estimate.low is None for estimate in self.after.values()):
            return f"{self.num_rows:,} rows."
        return (
            f"{self.num_rows:,} rows; in brackets the 95 % interval over {self.num_resamples:,} bootstrap resamples."
        )

    def gain_is_real(self) -> bool:
        """Whether NLL, the proper score, falls by more than chance and rounding."""
        change = self.change["nll"]
        return self.num_rows >= FEW and change.high < 0 and change.low <= -SAME

    def verdict(self) -> str:
        """One sentence: did NLL, the proper score, change for real, and if these rows cannot tell, how many could."""
        if self.change is None:
            return ""
        gain, low, high = -self.change["nll"].value, -self.change["nll"].high, -self.change["nll"].low
        if max(abs(low), abs(high)) < SAME:
            return "Nothing changed: the probabilities are the same before and after."
        interval = f"{abs(gain):.4f} nats (95 % interval of the gain {low:+.4f} to {high:+.4f})"
        if self.gain_is_real():
            return f"The gain is real: NLL falls by {interval}."
        if self.num_rows >= FEW and high < 0:
            return f"Do not use this calibrator: NLL rises by {interval}."
        rows = max(FEW, self.num_rows * ((high - low) / 2 / gain) ** 2) if gain else math.inf
        settle = f"about {_round_up(rows):,} rows" if rows < MANY else "no number of rows like these"
        verb = "falls" if gain > 0 else "rises"
        some = "1 row is" if self.num_rows == 1 else f"{self.num_rows:,} rows are"
        return f"{some} too few to tell: NLL {verb} by {interval}; {settle} would settle it."


def default_metrics(*, classes: bool) -> list[str]:
    """The metrics of the table, by name: all five of class probabilities; of events there is no accuracy."""
    return [name for name in TITLES if classes or name != "accuracy"]


def evaluate_calibration(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    before: torch.Tensor | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    ignore_index: int = -100,
) -> CalibrationReport:
    """Accuracy, NLL, Brier, ECE and smooth ECE, with 95 % bootstrap intervals, alone or against what was there before.

    Args:
        probs (`torch.Tensor`, floating): class probabilities `(..., C)`; or `(N,)` probabilities of an event, for
            which there is no accuracy. Logits are refused.
        labels (`torch.Tensor`, integer): `(...)` in `[0, C)`, or `(N,)` in {0, 1}. Use rows that neither training nor
            fitting has seen.
        before (`torch.Tensor`, *optional*): uncalibrated probabilities of the same rows; changes are then paired, on
            the same resamples.
        num_resamples (`int`): bootstrap resamples.
        seed (`int`): of the resampling.
        ignore_index (`int`): rows with this label are left out.
    Returns:
        [`CalibrationReport`]: `to_markdown()`, `to_dict()`, `verdict()`.
    Raises:
        ValueError: as `expected_calibration_error`, for `probs` or `before`; or `before` has another shape.
    Source:
        Intervals: `hf_calib.functional.resampling.bootstrap_interval`. ECE with 15 bins: Guo et al. 2017.
    """
    names = default_metrics(classes=isinstance(probs, torch.Tensor) and probs.dim() > 1)
    options = {"num_resamples": num_resamples, "seed": seed, "ignore_index": ignore_index}
    sides = [probs] if before is None else [probs, before]
    if before is None:
        found, estimates = None, bootstrap(names, probs, labels, **options)
    else:
        found = compare(names, probs, labels, before=before, **options)
        estimates = {name: comparison.after for name, comparison in found.items()}
    return CalibrationReport(
        next(iter(estimates.values())).num_rows,
        num_resamples,
        estimates,
        before=found and {name: comparison.before for name, comparison in found.items()},
        change=found and {name: comparison.change for name, comparison in found.items()},
        events=tuple(
            tuple(column[:, 0].cpu() for column in events(side, labels, ignore_index=ignore_index)) for side in sides
        ),
    )


def _round_up(count: float) -> int:
    """To two digits: how many rows would settle it is a rough answer and must look like one."""
    unit = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return math.ceil(count / unit) * unit
