"""One contract for every calibrator: logits in, logits out, fitted state in named tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..functional.checks import check_labels, describe


class Calibrator(nn.Module):
    """Maps logits to logits whose softmax is the calibrated probability. Subclasses say how in two pure functions.

    `_fit(logits, labels, weights)` returns the fitted tensors by name, and `_calibrate(logits)` applies them. Fitted
    tensors are non-persistent buffers, so they move with the model they are attached to, never enter its weights
    file, and keep their precision when the model is cast to another.

    Attributes:
        num_labels (`int` or `None`): number of classes it was fitted on.
        label_names (`list[str]` or `None`): their names, in order.
        provenance (`dict`): what it was fitted on; JSON values only, kept in `calibrator.json`.
    """

    name: ClassVar[str]  # the key in CALIBRATORS and the `type` in calibrator.json
    tensor_names: ClassVar[tuple[str, ...]] = ()
    tensor_dtype: ClassVar[torch.dtype] = torch.float32
    preserves_accuracy: ClassVar[bool]  # the most probable class never changes
    contains_identity: ClassVar[bool]  # fitting cannot make the fitting set's NLL worse

    def __init__(self):
        super().__init__()
        for name in self.tensor_names:
            self.register_buffer(name, None, persistent=False)
        self.num_labels: int | None = None
        self.label_names: list[str] | None = None
        self.provenance: dict[str, Any] = {}

    def fit(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        ignore_index: int = -100,
    ) -> Calibrator:
        """Fits on rows that the model was not trained on.

        Args:
            logits (`torch.Tensor` of shape `(..., C)`, floating): raw logits or log-probabilities. `-inf` marks
                classes that cannot occur.
            labels (`torch.Tensor` of shape `(...)`, integer in `[0, C)`).
            sample_weight (`torch.Tensor` of shape `(...)`, floating, not negative, *optional*): how much each row
                counts.
            ignore_index (`int`): rows with this label are left out.
        Returns:
            the calibrator itself.
        Raises:
            ValueError: naming the argument, the value and what is allowed; the fitted state is then unchanged.
        """
        with torch.no_grad():
            logits, labels, weights = check_fit(logits, labels, sample_weight, ignore_index)
            tensors = self._fit(logits, labels, weights)
        self.set_tensors(tensors, num_labels=logits.shape[-1])
        self.provenance = {"rows": len(labels)}
        return self

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated logits: `(..., C)` floating gives `(..., C)` of the same dtype. A row constant is free."""
        if self.num_labels is None:
            raise ValueError(f"{type(self).__name__}: not fitted; call fit(logits, labels) or load one first")
        if not logits.is_floating_point():
            raise ValueError(f"logits: got {logits.dtype}; allowed are floating tensors")
        if logits.shape[-1] != self.num_labels:
            raise ValueError(
                f"logits: got {logits.shape[-1]} classes; this calibrator was fitted on {self.num_labels}"
            )
        return self._calibrate(logits)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Normalised calibrated log-probabilities: `(..., C)`, float32, or float64 when the logits are."""
        return self(logits.to(torch.promote_types(logits.dtype, torch.float32))).log_softmax(-1)

    def set_tensors(self, tensors: dict[str, torch.Tensor], *, num_labels: int) -> None:
        """Takes over fitted state."""
        for name in self.tensor_names:
            setattr(self, name, tensors[name])
        self.num_labels = num_labels

    def check_tensors(self, tensors: dict[str, torch.Tensor], num_labels: int, source: str) -> None:
        """Raises a ValueError naming `source` unless the tensors are what `_fit` could have returned."""
        for name, tensor in tensors.items():
            if tensor.dtype != self.tensor_dtype or not bool(tensor.isfinite().all()):
                raise ValueError(f"{source}: {name} is not a finite {self.tensor_dtype} tensor")
        if (problem := self._problem(tensors, num_labels)) is not None:
            raise ValueError(f"{source}: {problem}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fitted state by name."""
        return {name: getattr(self, name) for name in self.tensor_names}

    def save_pretrained(self, path: str | Path) -> None:
        """Writes `calibrator.json` and `calibrator.safetensors` into the folder `path`, made if it is missing."""
        from .storage import write_calibrator

        write_calibrator(self, Path(path))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Commits the two files to the Hub repo `repo_id`, made if it is missing; returns the commit's URL."""
        from .storage import push_calibrator

        return push_calibrator(self, repo_id, private=private, token=token)

    def extra_repr(self) -> str:
        return "not fitted" if self.num_labels is None else f"num_labels={self.num_labels}"

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _problem(self, tensors: dict[str, torch.Tensor], num_labels: int) -> str | None:
        """What is wrong with the shapes or values of finite tensors, if anything is."""
        return None

    def _apply(self, fn, recurse=True):
        # model.to(torch.bfloat16) must not round a temperature of 2.8826 to 2.875: follow the device, keep the dtype
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in self._buffers.items():
            if tensor is not None and tensor.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(tensor.device)
        return self


class IdentityCalibration(Calibrator):
    """Changes nothing. *When to use:* as the candidate that every other one has to beat.

    Example:
        >>> import torch
        >>> IdentityCalibration().fit(torch.eye(3), torch.arange(3))(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[1., 2., 3.]])
    """

    name = "identity"
    preserves_accuracy = True
    contains_identity = True

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def check_fit(
    logits: torch.Tensor, labels: torch.Tensor, sample_weight: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Validates what a calibrator is fitted on, flattens it and leaves out ignored rows.

    Returns:
        logits `(N, C)` in their own dtype, labels `(N,)` int64, weights `(N,)` float64 with mean 1.
    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise ValueError(f"logits: got {describe(logits)}; allowed are floating torch tensors")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise ValueError(f"labels: got {describe(labels)}; allowed are integer torch tensors")
    if logits.dim() < 2 or logits.shape[-1] < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; "
            "allowed are (..., C) logits of at least two classes for (...) labels"
        )
    weights = _check_weights(sample_weight, labels)
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    kept = (labels != ignore_index) & (weights > 0)
    if not kept.all():
        logits, labels, weights = logits[kept], labels[kept], weights[kept]
    if len(labels) == 0:
        raise ValueError(f"labels: no row is left after leaving out ignore_index={ignore_index} and weights of 0")
    check_labels(labels, logits.shape[-1])
    _check_finite(logits, labels, kept)
    weights = weights / weights.max()  # first, so that the mean of huge weights is finite
    return logits, labels, weights / weights.mean()


def _check_weights(sample_weight: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    if sample_weight is None:
        return torch.ones(labels.numel(), dtype=torch.float64, device=labels.device)
    if not isinstance(sample_weight, torch.Tensor):
        raise ValueError(f"sample_weight: got {type(sample_weight).__name__}; allowed are tensors")
    if sample_weight.shape != labels.shape:
        raise ValueError(f"sample_weight: got shape {tuple(sample_weight.shape)}; allowed is {tuple(labels.shape)}")
    weights = sample_weight.reshape(-1).double()
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("sample_weight: got a negative or non-finite value; allowed are finite values from 0 up")
    return weights


def _check_finite(logits: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor) -> None:
    highest = logits.amax(-1)  # NaN where the row holds one, +inf likewise, -inf where nothing is possible
    wrong = highest.isfinite().logical_not()
    if wrong.any():
        first = wrong.nonzero()[0]
        raise ValueError(
            f"logits: the largest of row {int(kept.nonzero()[first])} is {float(highest[first])}; allowed are finite "
            "values, and -inf for classes that cannot occur"
        )
    chosen = logits.gather(-1, labels[:, None])[:, 0]
    if not chosen.isfinite().all():
        first = chosen.isfinite().logical_not().nonzero()[0]
        raise ValueError(
            f"labels: row {int(kept.nonzero()[first])} has class {int(labels[first])}, whose logit is -inf: "
            "it cannot occur"
        )
