"""What the tests of streaming metrics run over: every metric, with some options."""

import torch

from hf_calib.metrics import METRICS


VARIANTS = {
    **{name: (name, {}) for name in METRICS},
    "ece-10": ("ece", {"num_bins": 10}),
    "ece-30": ("ece", {"num_bins": 30}),
    "ece-7": ("ece", {"num_bins": 7}),
    "ece-l2": ("ece", {"norm": "l2"}),
    "ece-mass": ("ece", {"binning": "mass", "num_bins": 10}),
    "ece-class": ("ece", {"target": "class", "num_bins": 20}),
    "weighted-7": ("weighted_ece", {"num_bins": 7}),
    "mce-20": ("mce", {"num_bins": 20}),
    "debiased-l1": ("debiased_ece", {"norm": "l1", "binning": "width"}),
    "smooth-class": ("smooth_ece", {"target": "class"}),
    "accuracy-at-half": ("accuracy_at_coverage", {"coverage": 0.5}),
    "coverage-at-30": ("coverage_at_risk", {"risk": 0.3}),
}
CURVES = ("calibration_curve", "risk_coverage_curve")
TESTS = ("ks", "kuiper", "spiegelhalter")
SCALARS = {key: variant for key, variant in VARIANTS.items() if variant[0] not in CURVES}
CLASSES_ONLY = ("accuracy", "weighted_ece")  # metrics that events do not have


def make(key):
    """A fresh metric of a variant, and its function with the same options."""
    name, options = VARIANTS[key]
    kind = METRICS[name]
    return kind(**options), lambda *rows, **more: kind.function(*rows, **options, **more)


def number(value):
    """The value of a scalar, the statistic of a test."""
    return float(value[0] if isinstance(value, tuple) else value)


def class_rows(num_rows=400, num_labels=4, *, seed=0, dtype=torch.float64):
    """Too sure rows from a continuum, and labels that follow them half-heartedly."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, num_labels, generator=generator, dtype=torch.float64)
    labels = (logits / 2).softmax(-1).multinomial(1, generator=generator)[:, 0]
    return logits.softmax(-1).to(dtype), labels


def coarse_rows(num_rows=400, *, seed=0):
    """Rows whose probabilities are multiples of 1/60: two of them never share a cell, and many lie on an edge."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randint(0, 21, (num_rows, 2), generator=generator)
    probs = torch.cat([parts, 60 - parts.sum(-1, keepdim=True)], dim=-1).double() / 60
    return probs, probs.multinomial(1, generator=generator)[:, 0]


def event_rows(num_rows=400, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return scores, (torch.rand(num_rows, generator=generator) < scores.square()).long()
