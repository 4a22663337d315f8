"""Before and after in one table, each number with an interval, and a sentence that says whether the change is real."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .functional import accuracy, brier_score, negative_log_likelihood
from .functional.binning import bin_numbers, interior_edges
from .functional.calibration import events
from .functional.checks import check_count, check_probs
from .functional.resampling import SumStatistic, bootstrap_interval, mean_statistic, resample_counts
from .functional.smoothing import NUM_CELLS, grid_position, smooth_error


NUM_BINS = 15
SAME = 1e-6  # nats: less is rounding
FEW = 30  # rows: a bootstrap interval over fewer is too narrow to be believed
MANY = 1e6  # rows: nobody labels more to settle a difference so small
TITLES = {"accuracy": "Accuracy", "nll": "NLL (nats)", "brier": "Brier", "ece": "ECE", "smooth_ece": "Smooth ECE"}
HIGHEST = {"accuracy": 1.0, "nll": math.inf, "brier": 2.0, "ece": 1.0, "smooth_ece": 1.0}


class Estimate(NamedTuple):
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.3f}, {self.high:.3f}]"


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
        """Plain JSON values: each estimate as `{"value", "low", "high"}`."""
        record: dict[str, Any] = {"num_rows": self.num_rows, "num_resamples": self.num_resamples}
        for key in ("before", "after", "change"):
            if (estimates := getattr(self, key)) is not None:
                record[key] = {name: estimate._asdict() for name, estimate in estimates.items()}
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> CalibrationReport:
        """What `to_dict` gave; without the events, so without a figure."""
        estimates = {
            key: {name: Estimate(**estimate) for name, estimate in record[key].items()}
            for key in ("before", "after", "change")
            if key in record
        }
        return cls(record["num_rows"], record["num_resamples"], **estimates)

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
            return [[TITLES[name], str(estimate)] for name, estimate in self.after.items()]
        return [
            [
                TITLES[name],
                str(self.before[name]),
                str(estimate),
                "{:+.4f} [{:+.3f}, {:+.3f}]".format(*self.change[name]),
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
        return (
            f"{self.num_rows:,} rows; in brackets the 95 % interval over {self.num_resamples:,} bootstrap resamples."
        )

    def verdict(self) -> str:
        """One sentence: did NLL, the proper score, change for real, and if these rows cannot tell, how many could."""
        if self.change is None:
            return ""
        gain, low, high = -self.change["nll"].value, -self.change["nll"].high, -self.change["nll"].low
        if max(abs(low), abs(high)) < SAME:
            return "Nothing changed: the probabilities are the same before and after."
        interval = f"{abs(gain):.4f} nats (95 % interval of the gain {low:+.4f} to {high:+.4f})"
        if self.num_rows >= FEW and low > 0:
            return f"The gain is real: NLL falls by {interval}."
        if self.num_rows >= FEW and high < 0:
            return f"Do not use this calibrator: NLL rises by {interval}."
        rows = max(FEW, self.num_rows * ((high - low) / 2 / gain) ** 2) if gain else math.inf
        settle = f"about {_round_up(rows):,} rows" if rows < MANY else "no number of rows like these"
        verb = "falls" if gain > 0 else "rises"
        some = "1 row is" if self.num_rows == 1 else f"{self.num_rows:,} rows are"
        return f"{some} too few to tell: NLL {verb} by {interval}; {settle} would settle it."


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
    check_count("num_resamples", num_resamples)
    sides = [check_probs(probs, labels, ignore_index=ignore_index)]
    if before is not None:
        if isinstance(before, torch.Tensor) and before.shape != probs.shape:
            raise ValueError(
                f"before: got shape {tuple(before.shape)}; allowed is that of probs, {tuple(probs.shape)}"
            )
        sides.append(check_probs(before, labels, ignore_index=ignore_index, name="before"))
    sides = [(rows.cpu(), happened.cpu()) for rows, happened in sides]
    statistics = [_statistics(*side) for side in sides]
    num_rows = len(sides[0][1])
    values = _evaluate(statistics, torch.ones(num_rows, 1, dtype=torch.float64))
    blocks = [_evaluate(statistics, counts) for counts in resample_counts(num_rows, num_resamples, seed=seed)]
    replicates = [
        {name: torch.cat([block[i][name] for block in blocks]) for name in values[i]} for i in range(len(sides))
    ]
    return CalibrationReport(
        num_rows,
        num_resamples,
        *(_estimates(value, draws, HIGHEST) for value, draws in zip(values, replicates, strict=True)),
        change=None if before is None else _estimates(_difference(*values), _difference(*replicates)),
        events=tuple(tuple(column[:, 0] for column in events(*side)) for side in sides),
    )


def _evaluate(statistics: list[dict[str, SumStatistic]], counts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{name: statistic(counts) for name, statistic in side.items()} for side in statistics]


def _difference(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: after[name] - before[name] for name in after}


def _estimates(
    values: dict[str, torch.Tensor], replicates: dict[str, torch.Tensor], highest: dict[str, float] | None = None
) -> dict[str, Estimate]:
    """Each value with its interval, which ends at 0 and at `highest` where that is given."""
    found = {}
    for name, value in values.items():
        low, high = bootstrap_interval(float(value), replicates[name])
        if highest is not None:
            low, high = max(low, 0.0), min(high, highest[name])
        found[name] = Estimate(float(value), low, high)
    return found


def _statistics(probs: torch.Tensor, labels: torch.Tensor) -> dict[str, SumStatistic]:
    """Every metric of the table as a function of sums over rows."""
    rows = [("nll", negative_log_likelihood), ("brier", brier_score)]
    if probs.dim() > 1:
        rows.insert(0, ("accuracy", accuracy))
    scores, outcomes = events(probs, labels)
    residuals = outcomes.double() - scores.double()
    bins = bin_numbers(scores, interior_edges(scores, NUM_BINS, "width"))
    cells, upper = grid_position(scores)
    return {
        **{name: mean_statistic(function(probs, labels, reduction="none")) for name, function in rows},
        "ece": SumStatistic(bins, residuals, NUM_BINS, lambda sums: sums.abs().sum(-1)),
        "smooth_ece": SumStatistic(
            torch.cat([cells, cells + 1], dim=1),
            torch.cat([residuals * (1 - upper), residuals * upper], dim=1),
            NUM_CELLS + 1,
            smooth_error,
        ),
    }


def _round_up(count: float) -> int:
    """To two digits: how many rows would settle it is a rough answer and must look like one."""
    unit = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return math.ceil(count / unit) * unit
