"""One contract for every calibrator: logits in, logits out, fitted state in named tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import nn

from ..functional.checks import check_choice
from .rows import FitRows, check_rows, hard_rows, two_class_logits
from .storage import write_files


TASKS = (None, "binary", "multilabel")


class Calibrator(nn.Module):
    """Maps logits to logits whose softmax is the calibrated probability. Subclasses say how in two pure functions.

    `_fit(logits, labels, weights)` returns the fitted tensors by name, and `_calibrate(logits)` applies them. Fitted
    tensors are non-persistent buffers, so they move with the model they are attached to, never enter its weights
    file, and keep their precision when the model is cast to another.

    Args:
        task (`None`, `"binary"` or `"multilabel"`): classes of which one is right; one logit, whose sigmoid is the
            probability of an event; or a logit for each of several labels, which are calibrated one by one.
    Attributes:
        num_labels (`int` or `None`): number of classes or labels it was fitted on, 1 where it is binary.
        label_names (`list[str]` or `None`): their names, in order.
        provenance (`dict`): what it was fitted on; JSON values only, kept in `calibrator.json`.
        members (`torch.nn.ModuleList`): the calibrators that it is made of: those of each label, or those it composes.
    """

    name: ClassVar[str]  # the key in CALIBRATORS and the `type` in calibrator.json
    tensor_names: ClassVar[tuple[str, ...]] = ()
    tensor_dtype: ClassVar[torch.dtype] = torch.float32
    setting_names: ClassVar[tuple[str, ...]] = ()  # arguments of the constructor, JSON values
    preserves_accuracy: ClassVar[bool]  # the most probable class never changes
    contains_identity: ClassVar[bool]  # fitting cannot make the fitting set's NLL worse
    two_classes_only: ClassVar[bool] = False
    is_composed: ClassVar[bool] = False  # of calibrators that the constructor takes first
    needs_groups: bool = False  # at the fit and at every use
    is_affine: bool = False  # a linear map of logits and a bias, up to a constant in each row
    scales_alike: ClassVar[bool] = False  # every logit by the same number, so that rows of any length make sense

    def __init__(self, *, task: str | None = None):
        super().__init__()
        check_choice("task", task, TASKS)
        self.task = task
        for name in self.tensor_names:
            self.register_buffer(name, None, persistent=False)
        self.members = nn.ModuleList()
        self.num_labels: int | None = None
        self.label_names: list[str] | None = None
        self.provenance: dict[str, Any] = {}

    def fit(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        groups: torch.Tensor | None = None,
        ignore_index: int = -100,
    ) -> Calibrator:
        """Fits on rows that the model was not trained on.

        Args:
            logits (`torch.Tensor` of shape `(..., C)`, floating): raw logits or log-probabilities. `-inf` marks
                classes that cannot occur. With `task="binary"` `(...)` or `(..., 1)`, with `task="multilabel"`
                `(..., L)`.
            labels (`torch.Tensor` of shape `(...)`, integer in `[0, C)`; or `(..., C)`, floating): classes, or a
                distribution over them in each row, as several annotators give it. With a `task`: 0 and 1, or the
                floating probability of 1, in the logits' shape.
            sample_weight (`torch.Tensor` of shape `(...)`, floating, not negative, *optional*): how much each row
                counts; only their ratios matter.
            groups (`torch.Tensor` of shape `(...)`, integer from 0 up, *optional*): for calibrators of groups.
            ignore_index (`int`): rows with this label (in every class, where labels are soft) are left out.
        Returns:
            the calibrator itself.
        Raises:
            ValueError: naming the argument, the value and what is allowed; the fitted state is then unchanged.
        """
        with torch.no_grad():
            self._check_groups(groups)
            if self.task == "multilabel":
                members = self._fit_labels(logits, labels, sample_weight, groups, ignore_index)
                self.set_tensors({}, num_labels=len(members), members=members)
                self.provenance = {"rows": max(member.provenance["rows"] for member in members)}
                return self
            rows = check_rows(logits, labels, sample_weight, groups, ignore_index=ignore_index, task=self.task)
            return self.fit_rows(rows)

    def fit_rows(self, rows: FitRows) -> Calibrator:
        """`fit` on rows that `check_rows` has returned."""
        num_classes = rows.logits.shape[-1]
        self._check_groups(rows.groups)
        if self.two_classes_only and num_classes != 2:
            raise ValueError(
                f"logits: got {num_classes} classes; allowed for {self.name} are 2. "
                f"OneVsRest({type(self).__name__}()) takes more"
            )
        tensors, members = self._fit_rows(rows)
        self.set_tensors(tensors, num_labels=1 if self.task else num_classes, members=members)
        self.provenance = {"rows": rows.num_rows}
        return self

    def forward(self, logits: torch.Tensor, *, groups: torch.Tensor | None = None) -> torch.Tensor:
        """Calibrated logits: `(..., C)` floating gives `(..., C)` of the same dtype. A row constant is free.

        Binary logits are of any shape. Calibrators of groups also need `groups`, `(...)` integers from 0 up.
        """
        self.check_logits(logits)
        self._check_groups(groups)
        options = {} if groups is None else {"groups": groups}
        if self.task == "multilabel":
            columns = zip(self.members, logits.unbind(-1), strict=True)
            return torch.stack([member(column, **options) for member, column in columns], dim=-1)
        if self.task == "binary":
            absent, present = self._calibrate(two_class_logits(logits), **options).unbind(-1)
            return present - absent
        return self._calibrate(logits, **options)

    def calibrate_positions(self, logits: torch.Tensor) -> torch.Tensor:
        """As `forward`, of rows whose length differs from row to row: positions in a text, or choices."""
        if not self.scales_alike or self.task is not None:
            raise ValueError(f"calibrator: got {self.name}; allowed on positions is one temperature for all")
        return self._calibrate(logits)

    def log_probs(self, logits: torch.Tensor, *, groups: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised calibrated log-probabilities: `(..., C)`, float32, or float64 when the logits are.

        With a `task` they are those of each event, in the logits' shape.
        """
        calibrated = self(logits.to(torch.promote_types(logits.dtype, torch.float32)), groups=groups)
        return calibrated.log_softmax(-1) if self.task is None else nn.functional.logsigmoid(calibrated)

    def check_logits(self, logits: torch.Tensor) -> None:
        """Raises a ValueError unless this is fitted, on as many classes as these logits have."""
        if self.num_labels is None:
            raise ValueError(f"{type(self).__name__}: not fitted; call fit(logits, labels) or load one first")
        if not logits.is_floating_point():
            raise ValueError(f"logits: got {logits.dtype}; allowed are floating tensors")
        if self.task != "binary" and (logits.dim() == 0 or logits.shape[-1] != self.num_labels):
            raise ValueError(
                f"logits: got {logits.shape[-1] if logits.dim() else 'no'} classes; this calibrator was fitted on "
                f"{self.num_labels}"
            )

    def set_tensors(
        self, tensors: dict[str, torch.Tensor], *, num_labels: int, members: Sequence[Calibrator] = ()
    ) -> None:
        """Takes over fitted state: own tensors by name, and the fitted members."""
        for name in self.tensor_names:
            setattr(self, name, tensors.get(name))
        self.members = nn.ModuleList(members)
        self.num_labels = num_labels

    def check_tensors(self, tensors: dict[str, torch.Tensor], num_labels: int, source: str) -> None:
        """Raises a ValueError naming `source` unless the own tensors are what `_fit` could have returned."""
        num_labels = 2 if self.task == "binary" else num_labels
        for name, tensor in tensors.items():
            if tensor.dtype != self.tensor_dtype or not bool(tensor.isfinite().all()):
                raise ValueError(f"{source}: {name} is not a finite {self.tensor_dtype} tensor")
        if self.task != "multilabel" and (problem := self._problem(tensors, num_labels)) is not None:
            raise ValueError(f"{source}: {problem}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fitted state by name; that of the second member as `members.1.temperature`."""
        own = {name: getattr(self, name) for name in self.own_tensor_names()}
        return own | {
            f"members.{index}.{name}": tensor
            for index, member in enumerate(self.members)
            for name, tensor in member.tensors().items()
        }

    def expected_members(self, num_labels: int) -> tuple[int, int]:
        """How many members there are once this is fitted, and the `num_labels` of each."""
        return (num_labels, 1) if self.task == "multilabel" else (0, 0)

    def own_tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors beside those of the members: with several labels there are none."""
        return () if self.task == "multilabel" else self.tensor_names

    def settings(self) -> dict[str, Any]:
        """What the constructor was given, as JSON values; what is None is left out."""
        names = ("task", *self.setting_names)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def record(self, **extra: Any) -> dict[str, Any]:
        """What `calibrator.json` says of a fitted calibrator, and `extra` keys."""
        if self.num_labels is None:
            raise ValueError(f"calibrator: got a {type(self).__name__} that is not fitted; fit it first")
        names = self.label_names
        if names is not None and not are_label_names(names, self.num_labels):
            raise ValueError(f"label_names: got {names!r}; allowed is a list of {self.num_labels} strings")
        return {**self._description(), "label_names": names, "fit": self.provenance, **extra}

    def _description(self) -> dict[str, Any]:
        """What it is, without what was fitted: its type, its settings and, the same way, its members."""
        found = {"type": self.name, "num_labels": self.num_labels}
        if settings := self.settings():
            found["settings"] = settings
        if len(self.members):
            found["members"] = [member._description() for member in self.members]
        return found

    def save_pretrained(self, path: str | Path) -> None:
        """Writes `calibrator.json` and `calibrator.safetensors` into the folder `path`, made if it is missing."""
        write_files(Path(path), self.record(), self.tensors())

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Commits the two files to the Hub repo `repo_id`, made if it is missing; returns the commit's URL."""
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"Add {self.name} calibrator"
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url)

    def __repr__(self) -> str:
        return super().__repr__() if len(self.members) else f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return "not fitted" if self.num_labels is None else f"num_labels={self.num_labels}"

    def _fit_rows(self, rows: FitRows) -> tuple[dict[str, torch.Tensor], list[Calibrator]]:
        """Own tensors and fitted members from checked rows."""
        rows = hard_rows(rows)
        groups = (rows.groups,) if self.needs_groups else ()
        return self._fit(rows.logits, rows.labels, rows.weights, *groups), []

    def _fit_labels(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        sample_weight: torch.Tensor | None,
        groups: torch.Tensor | None,
        ignore_index: int,
    ) -> list[Calibrator]:
        """A binary calibrator of each label."""
        check_label_shapes(logits, labels)
        options = {"sample_weight": sample_weight, "groups": groups, "ignore_index": ignore_index}
        columns = zip(self._unfitted(logits.shape[-1]), logits.unbind(-1), labels.unbind(-1), strict=True)
        return [member.fit(*column, **options) for member, *column in columns]

    def _unfitted(self, num_labels: int) -> list[Calibrator]:
        """The same calibrator, not fitted, for each of several labels alone."""
        return [type(self)(**(self.settings() | {"task": "binary"})) for _ in range(num_labels)]

    def _check_groups(self, groups: torch.Tensor | None) -> None:
        if (groups is not None) != self.needs_groups:
            got, allowed = ("none", "a tensor") if groups is None else ("a tensor", "none")
            raise ValueError(f"groups: got {got}; allowed for {self.name} is {allowed}")

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


def check_label_shapes(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises a ValueError unless there is one label for each of several logits."""
    shapes = [tuple(getattr(tensor, "shape", ())) for tensor in (logits, labels)]
    if shapes[0] != shapes[1] or not shapes[0] or 0 in shapes[0]:
        raise ValueError(
            f'logits: got shape {shapes[0]} for labels of shape {shapes[1]}; with task="multilabel" allowed are one '
            "logit for each label"
        )


def are_label_names(names: Any, num_labels: int) -> bool:
    """Whether it is a list with a string for each label."""
    return isinstance(names, list) and len(names) == num_labels and all(isinstance(name, str) for name in names)


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
    is_affine = True
    scales_alike = True

    def _fit(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def _calibrate(self, logits: torch.Tensor) -> torch.Tensor:
        return logits
