"""What the tests of several metrics run over: every metric, every dtype."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_calib.functional import (
    accuracy,
    accuracy_at_coverage,
    adaptive_calibration_error,
    area_under_generalised_risk_coverage,
    area_under_risk_coverage,
    brier_score,
    classwise_calibration_error,
    coverage_at_risk,
    debiased_calibration_error,
    expected_calibration_error,
    kolmogorov_smirnov_test,
    kuiper_test,
    maximum_calibration_error,
    negative_log_likelihood,
    overconfidence,
    smooth_calibration_error,
    underconfidence,
    weighted_calibration_error,
)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ERRORS = {
    "ece": expected_calibration_error,
    "l2": partial(expected_calibration_error, norm="l2"),
    "mass": partial(expected_calibration_error, binning="mass"),
    "debiased": debiased_calibration_error,
    "debiased-l1": partial(debiased_calibration_error, norm="l1"),
    "overconfidence": overconfidence,
    "maximum": maximum_calibration_error,
    "adaptive": adaptive_calibration_error,
    "classwise": classwise_calibration_error,
    "smooth": smooth_calibration_error,
    "smooth-classwise": partial(smooth_calibration_error, target="class"),
}


def statistic(test):
    """A test of calibration as a metric: its statistic."""
    return lambda *rows, **options: test(*rows, **options).statistic


# metrics that take several labels at once, those that take events, and all: those that take class probabilities
MULTILABEL = {**ERRORS, "underconfidence": underconfidence, "brier": brier_score, "nll": negative_log_likelihood}
OF_EVENTS = {
    **MULTILABEL,
    "ks": statistic(kolmogorov_smirnov_test),
    "kuiper": statistic(kuiper_test),
    "aurc": area_under_risk_coverage,
    "augrc": area_under_generalised_risk_coverage,
    "accuracy-at-coverage": accuracy_at_coverage,
    "coverage-at-risk": coverage_at_risk,
}
METRICS = {**OF_EVENTS, "accuracy": accuracy, "weighted": weighted_calibration_error}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class LargeTensors(TorchDispatchMode):
    """Counts operations that give a new tensor of at least so many elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        is_new = not (function.is_view or function._schema.is_mutable)
        if is_new and isinstance(output, torch.Tensor) and output.numel() >= self.size:
            self.made.append(str(function))
        return output
