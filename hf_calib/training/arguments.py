"""`TrainingArguments` and the choices that calibrated training adds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..calibrators import CALIBRATORS
from ..functional.checks import check_number
from ..losses import LOSSES, make_loss


CALIBRATOR_CHOICES = ("auto", *CALIBRATORS)
LOWER_IS_BETTER = ("nll", "refinement", "ece", "brier")


@dataclass
class CalibrationTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with a loss and a calibrator.

    Added: `calibration_loss=None`, `calibration_loss_kwargs=None`, `calibrator="temperature"`, `mixup_alpha=0.0`,
    `mixup_weight=None`. No default of `TrainingArguments` is changed, but `metric_for_best_model` knows that NLL,
    refinement, ECE and Brier are better when they are lower: `TrainingArguments` alone would keep the worst
    checkpoint. They parse from the command line and from JSON like all others.

    When to use: with `CalibrationTrainer`, in place of `TrainingArguments`.

    Args:
        calibration_loss (`str`, *optional*): the loss to train with, a key of `LOSSES`, such as `"focal"`. None is
            the model's own.
        calibration_loss_kwargs (`dict` or `str`, *optional*): hyper-parameters of that loss; a string is read as JSON,
            as in `--calibration_loss_kwargs '{"gamma": 2.0}'`.
        calibrator (`str`): what `CalibrationTrainer.calibrate` fits, a key of `CALIBRATORS`, or `"auto"`, which
            selects one by its cross-validated negative log-likelihood.
        mixup_alpha (`float`, at least 0): above 0, each batch is trained on as mixtures of its rows, with shares from
            Beta(alpha, alpha); 0.4 is a common choice (Thulasidasan et al. 2019, arXiv 1905.11001).
        mixup_weight (`float`, *optional*): keeps the rows themselves, and adds the loss of the mixtures with this
            weight; 1.0 with a `mixup_alpha` of 10 is RegMixup (Pinto et al. 2022, arXiv 2206.14502).
        kwargs: everything that `TrainingArguments` takes, except `label_smoothing_factor`.
    Raises:
        ValueError: a name or a hyper-parameter is unknown, a value is out of its range, the string is not a JSON
            object, or `label_smoothing_factor` is used: label smoothing is a `calibration_loss` here.
    Example:
        >>> from hf_calib.training import CalibrationTrainingArguments
        >>> args = CalibrationTrainingArguments("out", calibration_loss="focal", use_cpu=True)
        >>> args.calibration_loss, args.calibrator
        ('focal', 'temperature')
    """

    calibration_loss: str | None = field(
        default=None,
        metadata={"help": f"The loss to train with: {', '.join(LOSSES)}. None is the model's own."},
    )
    # `str` is there for the command line: HfArgumentParser hands over what was typed.
    calibration_loss_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Hyper-parameters of calibration_loss as a JSON object, such as '{\"gamma\": 2.0}'."},
    )
    calibrator: str = field(
        default="temperature",
        metadata={"help": f"What CalibrationTrainer.calibrate fits: {', '.join(CALIBRATOR_CHOICES)}."},
    )
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Above 0, a batch is trained on as mixtures of its rows."}
    )
    mixup_weight: float | None = field(
        default=None, metadata={"help": "Of the mixtures' loss, added to that of the rows. None is mixtures alone."}
    )

    def __post_init__(self):
        check_number("mixup_alpha", self.mixup_alpha)
        if self.mixup_weight is not None:
            check_number("mixup_weight", self.mixup_weight)
            if self.mixup_alpha == 0:
                raise ValueError(f"mixup_weight: got {self.mixup_weight!r}; allowed is None where mixup_alpha is 0")
        if isinstance(self.calibration_loss_kwargs, str):
            self.calibration_loss_kwargs = _read_json_object(self.calibration_loss_kwargs)
        elif isinstance(self.calibration_loss_kwargs, dict):  # trackers are given the arguments as JSON
            self.calibration_loss_kwargs = {
                name: value.tolist() if hasattr(value, "tolist") else value
                for name, value in self.calibration_loss_kwargs.items()
            }
        if self.calibration_loss is None and self.calibration_loss_kwargs:
            raise ValueError(
                f"calibration_loss_kwargs: got {self.calibration_loss_kwargs!r} without a calibration_loss; allowed "
                "values of calibration_loss are " + ", ".join(map(repr, LOSSES))
            )
        self.make_loss()  # a wrong name or value fails here, not at the first step
        check_calibrator_name(self.calibrator)
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor: got {self.label_smoothing_factor!r}; allowed is 0. Use "
                "calibration_loss='label_smoothing', calibration_loss_kwargs={'label_smoothing': "
                f"{self.label_smoothing_factor!r}}}, which is the same loss"
            )
        if self.greater_is_better is None and is_lower_better(self.metric_for_best_model):
            self.greater_is_better = False
        check_best_metric(self)
        super().__post_init__()

    def make_loss(self):
        """Builds the loss that these arguments name.

        Returns:
            `torch.nn.Module` that maps logits `(..., C)` and labels `(...)` to the sum of the rows' losses; where no
            loss is named, cross-entropy.
        Raises:
            ValueError: `calibration_loss` or `calibration_loss_kwargs` is not allowed.
        """
        name = "cross_entropy" if self.calibration_loss is None else self.calibration_loss
        try:
            return make_loss(name, self.calibration_loss_kwargs, reduction="sum")
        except ValueError as error:
            raise ValueError(
                f"calibration_loss={self.calibration_loss!r}, "
                f"calibration_loss_kwargs={self.calibration_loss_kwargs!r}: {error}"
            ) from error


def is_lower_better(metric: str | None) -> bool:
    """Whether a name such as `"refinement"`, `"eval_nll"` or `"eval_mine_nll"` is of a score that should be low."""
    if metric is None:
        return False
    of_a_set = metric.startswith("eval_") and metric.endswith(tuple(f"_{name}" for name in LOWER_IS_BETTER))
    return metric in LOWER_IS_BETTER or of_a_set


def check_best_metric(args: TrainingArguments) -> None:
    """Raises a ValueError where the best model would be the one of the worst score."""
    metric = args.metric_for_best_model
    if args.greater_is_better and metric is not None and metric.removeprefix("eval_") in LOWER_IS_BETTER:
        raise ValueError(
            f"greater_is_better: got True, which keeps the worst where metric_for_best_model={metric!r}; allowed is "
            "False"
        )


def check_calibrator_name(name: str) -> None:
    """Raises a ValueError unless `name` is `"auto"` or a key of `CALIBRATORS`."""
    if name not in CALIBRATOR_CHOICES:
        raise ValueError(f"calibrator: got {name!r}; allowed are {', '.join(map(repr, CALIBRATOR_CHOICES))}")


def _read_json_object(text: str) -> dict:
    allowed = 'allowed is a JSON object such as {"gamma": 2.0}'
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"calibration_loss_kwargs: got {text!r}; {allowed}") from error
    if not isinstance(value, dict):
        raise ValueError(f"calibration_loss_kwargs: got {text!r}; {allowed}")
    return value
