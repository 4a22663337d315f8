"""What the tests of several metrics run over: every metric, every dtype."""

from functools import partial

import pytest
import torch

from hf_calib.functional import (
    accuracy,
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
    smooth_calibration_error,
)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ERRORS = {
    "ece": expected_calibration_error,
    "l2": partial(expected_calibration_error, norm="l2"),
    "mass": partial(expected_calibration_error, binning="mass"),
    "maximum": maximum_calibration_error,
    "adaptive": adaptive_calibration_error,
    "classwise": classwise_calibration_error,
    "smooth": smooth_calibration_error,
    "smooth-classwise": partial(smooth_calibration_error, target="class"),
}
METRICS = {**ERRORS, "brier": brier_score, "nll": negative_log_likelihood, "accuracy": accuracy}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
