"""Calibrators made of calibrators: one after the other, one class against the rest, and weighted means."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from ..functional.checks import check_choice
from .base import Calibrator
from .label_shift import PriorCorrection
from .rows import FitRows, check_unlabelled, two_class_logits


class ComposedCalibrator(Calibrator):
    """A calibrator that is made of others, which a fit copies: those that were given stay as they are.

    Args:
        members (sequence of [`Calibrator`]): without a task of their own.
        task: as in [`Calibrator`], of the whole.
    """

    is_composed = True
    member_task: ClassVar[str | None] = None  # a task is the whole's
    preserves_accuracy = False
    contains_identity = False

    def __init__(self, members: Sequence[Calibrator], *, task: str | None = None):
        super().__init__(task=task)
        members = self.templates = tuple(members)
        if members and task == "multilabel" and all(isinstance(member, type(self)) for member in members):
            self.templates = members[0].templates  # of a file, which holds those of each label
        if not self.templates:
            raise ValueError("members: got none; allowed are calibrators")
        for member in self.templates:
            if not isinstance(member, Calibrator) or member.task != self.member_task:
                raise ValueError(f"members: got {member!r}; allowed are calibrators with task={self.member_task!r}")
        self.needs_groups = any(member.needs_groups for member in self.templates)
        self.members = nn.ModuleList(members)

    def expected_members(self, num_labels: int) -> tuple[int, int]:
        if self.task == "multilabel":
            return super().expected_members(num_labels)
        return len(self.templates), 2 if self.task == "binary" else num_labels

    def _unfitted(self, num_labels: int) -> list[Calibrator]:
        return [type(self)(self.templates, **(self.settings() | {"task": "binary"})) for _ in range(num_labels)]

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError  # members are fitted on rows, by `_fit_rows`


class Chain(ComposedCalibrator):
    """Calibrators one after the other, each fitted on what those before it make of the logits.

    *When to use:* to correct what a first map leaves, or to adapt a fitted map: of fitted members it needs no fit.

    Example:
        >>> import torch
        >>> from hf_calib.calibrators import CALIBRATORS
        >>> logits, labels = 4 * torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 0])
        >>> members = [CALIBRATORS["temperature"](), CALIBRATORS["isotonic"]()]
        >>> len(Chain(members).fit(logits, labels).members)
        2
    """

    name = "chain"

    def __init__(self, members: Sequence[Calibrator], *, task: str | None = None):
        super().__init__(members, task=task)
        self.preserves_accuracy = all(member.preserves_accuracy for member in self.templates)
        self.is_affine = all(member.is_affine for member in self.templates)
        sizes = {member.num_labels for member in self.templates}
        if task is None and len(sizes) == 1:
            self.num_labels = sizes.pop()

    def adapt(self, logits: torch.Tensor) -> Chain:
        """Adapts each [`PriorCorrection`] in it to what those before it make of logits without labels.

        Args:
            logits (`torch.Tensor` of shape `(..., C)`, floating): as `forward` takes them.
        Returns:
            the calibrator itself.
        Raises:
            ValueError: as `PriorCorrection.adapt`; there is none in it, or it has a `task` or groups.
        """
        if self.task or self.needs_groups or not any(isinstance(x, PriorCorrection) for x in self.templates):
            raise ValueError("members: got no PriorCorrection, or a task or groups, with which a chain cannot adapt")
        self.check_logits(logits)
        adapted, calibrated = [], check_unlabelled(logits).double()
        for member in self.members:
            if isinstance(member, PriorCorrection):
                member = copy.deepcopy(member).adapt(calibrated)
            calibrated = member(calibrated)
            adapted.append(member)
        self.members = nn.ModuleList(adapted)
        return self

    def _fit_rows(self, rows: FitRows) -> tuple[dict[str, torch.Tensor], list[Calibrator]]:
        members, rows = [], rows._replace(logits=rows.logits.double())
        for template in self.templates:
            member = copy.deepcopy(template).fit_rows(rows)
            options = {"groups": rows.groups} if member.needs_groups else {}
            rows = rows._replace(logits=member(rows.logits, **options))
            members.append(member)
        return {}, members

    def _calibrate(self, logits: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
        calibrated = logits.double()  # half precision would round between members
        for member in self.members:
            calibrated = member(calibrated, groups=groups) if member.needs_groups else member(calibrated)
        limits = torch.finfo(logits.dtype)
        return calibrated.clamp(limits.min, limits.max).where(calibrated.isfinite(), calibrated).to(logits.dtype)


class OneVsRest(ComposedCalibrator):
    r"""A calibrator of two classes for each class against the rest; what they say is divided by its sum.

    $$\hat p_k \propto \sigma\Big(f_k\big(\log\tfrac{p_k}{1 - p_k}\big)\Big)$$

    *When to use:* to give a method for two classes, such as beta calibration, more of them.

    Args:
        member ([`Calibrator`]): one, of which each class gets a copy.
    Source:
        Zadrozny & Elkan 2002, section 4.
    Example:
        >>> import torch
        >>> from hf_calib.calibrators import CALIBRATORS
        >>> logits, labels = torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 1, 2, 0])
        >>> len(OneVsRest(CALIBRATORS["temperature"]()).fit(logits, labels).members)
        3
    """

    name = "one_vs_rest"

    def __init__(self, member: Calibrator | Sequence[Calibrator], *, task: str | None = None):
        super().__init__([member] if isinstance(member, Calibrator) else member, task=task)
        if self.needs_groups:
            raise ValueError("member: got a calibrator of groups; allowed are those of logits alone")

    def expected_members(self, num_labels: int) -> tuple[int, int]:
        return super().expected_members(num_labels) if self.task else (num_labels, 2)

    def _fit_rows(self, rows: FitRows) -> tuple[dict[str, torch.Tensor], list[Calibrator]]:
        columns = two_class_logits(log_odds(rows.logits)).unbind(-2)
        members = []
        for k, column in enumerate(columns):
            if rows.labels.is_floating_point():
                labels = torch.stack([1 - rows.labels[:, k], rows.labels[:, k]], dim=-1)
            else:
                labels = (rows.labels == k).long()
            members.append(copy.deepcopy(self.templates[0]).fit_rows(rows._replace(logits=column, labels=labels)))
        return {}, members

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        columns = two_class_logits(log_odds(logits)).unbind(-2)
        mapped = [member(column).log_softmax(-1)[..., 1] for member, column in zip(self.members, columns, strict=True)]
        finite = torch.finfo(logits.dtype)
        log_probs = torch.stack(mapped, dim=-1).clamp_min(finite.min)
        return log_probs.masked_fill(logits == -torch.inf, -torch.inf).to(logits.dtype)


class PerLabel(ComposedCalibrator):
    """A calibrator of its own for each of several labels.

    *When to use:* where labels differ so much that no one method suits all; `select_calibrator` makes it.

    Args:
        members (sequence of [`Calibrator`]): one for each label, with `task="binary"`.
    Example:
        >>> import torch
        >>> from hf_calib.calibrators import CALIBRATORS
        >>> members = [CALIBRATORS["temperature"](task="binary"), CALIBRATORS["isotonic"](task="binary")]
        >>> logits = torch.tensor([[2.0, 1], [-1, 2], [1, -3], [-2, 0]])
        >>> labels = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1]])
        >>> PerLabel(members).fit(logits, labels)(logits).shape
        torch.Size([4, 2])
    """

    name = "per_label"
    member_task = "binary"

    def __init__(self, members: Sequence[Calibrator], *, task: str | None = "multilabel"):
        check_choice("task", task, ("multilabel",))
        super().__init__(members, task=task)
        self.is_affine = all(member.is_affine for member in self.templates)
        if all(member.num_labels for member in self.members):
            self.num_labels = len(self.members)

    def _unfitted(self, num_labels: int) -> list[Calibrator]:
        if num_labels != len(self.templates):
            raise ValueError(
                f"logits: got {num_labels} labels; allowed are {len(self.templates)}, one for each member"
            )
        return [copy.deepcopy(template) for template in self.templates]


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """`log p_k - log(1 - p_k)` of each class: `(..., C)` floating gives `(..., C)` float64.

    Infinite where a class is impossible, and where no other one is possible.
    """
    log_probs = logits.double().log_softmax(-1)
    top = log_probs.argmax(-1, keepdim=True)
    others = log_probs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)  # of the rest, where 1 - p cancels
    log_rest = torch.log(-torch.expm1(log_probs.scatter(-1, top, -1.0))).scatter(-1, top, others)
    return log_probs - log_rest
