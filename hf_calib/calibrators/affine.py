"""Calibrators that are affine maps of logits, as a weight and a bias: what can be written into a linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .base import Calibrator


MOST_CLASSES = 4096  # for which a (C, C) weight is made and inverted


class AffineMap(NamedTuple):
    """`W z + b` of logits `z`, up to a constant in each row, which no softmax sees.

    Attributes:
        weight (`torch.Tensor` of shape `()` or `(C, C)`, float64): one number for all classes, or all of W.
        bias (`torch.Tensor` of shape `(C,)`, float64, or `None`): `None` where it is 0.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """`(..., C)` logits mapped, in float64."""
        mapped = self.linear(logits)
        return mapped if self.bias is None else mapped + self.bias

    def linear(self, logits: torch.Tensor) -> torch.Tensor:
        """The map without its bias, of each row by itself: `(..., C)` gives `(..., C)` float64."""
        return logits.double() * self.weight if self.weight.dim() == 0 else logits.double() @ self.weight.T

    def inverse(self) -> AffineMap:
        """The map back: exact up to a constant in each row where W tells all classes apart."""
        weight = 1 / self.weight if self.weight.dim() == 0 else torch.linalg.pinv(self.weight)
        back = AffineMap(weight, None)
        return back if self.bias is None else back._replace(bias=-back.linear(self.bias))

    def to(self, device: torch.device) -> AffineMap:
        """The same map with its tensors on a device."""
        return AffineMap(self.weight.to(device), None if self.bias is None else self.bias.to(device))


def affine_map(calibrator: Calibrator) -> AffineMap | None:
    """The fitted calibrator as an affine map; `None` where it is none, or would need too large a weight.

    What it does to 0 is the bias, and what it does to each class's unit vector a column of the weight.
    """
    if not calibrator.is_affine:
        return None
    zero = torch.zeros(calibrator.num_labels, dtype=torch.float64, device=_device(calibrator))
    if calibrator.scales_alike and calibrator.task != "multilabel":  # where each label has a number of its own
        return AffineMap(calibrator(zero + 1)[0], None)
    if calibrator.num_labels > MOST_CLASSES:
        return None
    bias, columns = calibrator(zero), calibrator(torch.diag(zero + 1))
    weight = (columns - bias).T
    if calibrator.task is None:  # what it adds to all classes of a row is free
        weight, bias = weight - weight.mean(0), bias - bias.mean()
    return AffineMap(weight, bias if bool(bias.abs().max() > 1e-12) else None)


def _device(calibrator: Calibrator) -> torch.device:
    return next((tensor.device for tensor in calibrator.tensors().values()), torch.device("cpu"))
