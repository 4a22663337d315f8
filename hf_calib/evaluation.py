"""An evaluator for `evaluate` that looks at probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import evaluate
import torch
from datasets import Dataset
from transformers import Pipeline, PreTrainedConfig, PreTrainedModel, pipeline

from .attaching import check_can_calibrate, in_eval_mode, label_names_of
from .calibrators import Calibrator
from .evaluate_modules import evaluate_module
from .evaluate_modules.scores import as_calibrator
from .predictions import max_length, model_labels


BATCH_SIZE = 32


class CalibrationEvaluator(evaluate.TextClassificationEvaluator):
    """`evaluate`'s evaluator of text classifiers, for probabilities: a pipeline's rows go into the calibration module.

    *When to use:* where a script evaluates by `evaluate.evaluator("text-classification")` already.

    Example:
        >>> CalibrationEvaluator().task
        'text-classification'
    """

    PIPELINE_KWARGS: ClassVar = {"truncation": True, "top_k": None, "function_to_apply": "none"}

    def __init__(self, task: str = "text-classification", default_metric_name: str | None = None):
        super().__init__(task, default_metric_name=default_metric_name or evaluate_module("calibration"))

    def compute(
        self,
        model_or_pipeline: str | Path | PreTrainedModel | Pipeline,
        data: str | Dataset,
        subset: str | None = None,
        split: str | None = None,
        metric: str | evaluate.EvaluationModule | None = None,
        tokenizer: Any = None,
        *,
        calibrator: Calibrator | str | Path | None = None,
        device: int | None = None,
        input_column: str = "text",
        second_input_column: str | None = None,
        label_column: str = "label",
        label_mapping: Mapping[str, float | str] | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Evaluates a text classifier on labelled rows.

        Args:
            model_or_pipeline (folder, Hub repo id, model or pipeline): a calibrator that is attached to the model or
                folded into it counts as part of it. A folder or repo is loaded as transformers does, without an
                attached calibrator: for that, pass what `load_calibrated` returns.
            data, subset, split, device: as in `evaluate`.
            metric: the calibration module by default, or one with the same features.
            tokenizer: of a model.
            calibrator ([`Calibrator`], folder or Hub repo id, *optional*): for a model without one; every key then
                comes twice, after and, as `before_...`, before.
            input_column, second_input_column, label_column (`str`): text, second text of a sentence pair, label.
            label_mapping (`dict`, *optional*): the model's label name -> what `label_column` holds for it. By default
                labels are matched by name, as in `collect_predictions`.
            batch_size (`int`, *optional*): by default a pipeline's own, and 32 for a model.
            **options: of the module: `metrics`, `intervals`, `num_resamples`, `seed`.
        Returns:
            `dict`: what the module returns, and evaluate's `total_time_in_seconds`, `samples_per_second` and
            `latency_in_seconds`.
        Raises:
            ValueError: a column or label is unknown, the model is no single-label text classifier, or it is calibrated
                already and `calibrator` is given.
        """
        self.check_for_mismatch_in_device_setup(device, model_or_pipeline)
        data = self.load_data(data, subset=subset, split=split).with_format(None)
        _, inputs = self.prepare_data(data, input_column, second_input_column, label_column)
        pipe = self.prepare_pipeline(model_or_pipeline, tokenizer=tokenizer, device=device)
        if calibrator is not None:
            calibrator = as_calibrator(calibrator)
            check_can_calibrate(pipe.model, calibrator)
            options["calibrator"] = calibrator
        references = _references(data, label_column, pipe.model.config, label_mapping)
        # many tokenizers know no longest text, and evaluate then runs into the end of the position embeddings
        settings = {"max_length": max_length(pipe.tokenizer, pipe.model)}
        if batch_size is not None:
            settings["batch_size"] = batch_size
        with in_eval_mode(pipe.model):
            outputs, timing = self.call_pipeline(pipe, inputs, **settings)
        predictions = self.predictions_processor(outputs, label_names_of(pipe.model.config))
        found = self.prepare_metric(metric).compute(**predictions, references=references, **options)
        return {**(found or {}), **timing}

    def prepare_pipeline(
        self,
        model_or_pipeline: str | Path | PreTrainedModel | Pipeline,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        device: int | None = None,
    ) -> Pipeline:
        """The pipeline, made of a model if need be. evaluate's own asks transformers 5 for a class that is gone."""
        pipe = model_or_pipeline
        if isinstance(pipe, str | Path | PreTrainedModel):
            model = str(pipe) if isinstance(pipe, Path) else pipe
            device = self._infer_device() if device is None else device
            pipe = pipeline(self.task, model=model, tokenizer=tokenizer, device=device, batch_size=BATCH_SIZE)
        if not isinstance(pipe, Pipeline) or pipe.task != self.task:
            raise ValueError(
                f"model_or_pipeline: got {getattr(pipe, 'task', type(pipe).__name__)}; allowed are a {self.task} "
                "pipeline, a model, a folder or a Hub repo id"
            )
        config, names = pipe.model.config, label_names_of(pipe.model.config)
        if config.problem_type not in (None, "single_label_classification") or len(set(names)) < max(2, len(names)):
            raise ValueError(
                f"model_or_pipeline: got problem_type={config.problem_type!r} and labels {names}; allowed is "
                "single-label classification with at least two labels, no two of one name"
            )
        return pipe

    def predictions_processor(self, predictions: list[list[dict]], label_names: list[str]) -> dict[str, torch.Tensor]:
        """Probability rows in the order of the names, of logits that come in any order."""
        columns = {name: index for index, name in enumerate(label_names)}
        logits = torch.empty(len(predictions), len(columns))
        for row, labels in zip(logits, predictions, strict=True):
            for label in labels:
                row[columns[label["label"]]] = label["score"]
        return {"predictions": logits.softmax(-1)}


def _references(
    data: Dataset, column: str, config: PreTrainedConfig, label_mapping: Mapping[str, float | str] | None
) -> torch.Tensor:
    """The model's id of each row's label."""
    label_map = label_mapping and _label_map(label_mapping, getattr(data.features[column], "names", None))
    try:
        return torch.tensor(model_labels(data, column, config, label_map))
    except ValueError as error:  # its advice is for collect_predictions, whose mapping goes the other way
        problem, advice, _ = str(error).partition("; say which is which by label_map")
        remedy = "; say which is which by label_mapping, such as {'NEGATIVE': 'neg'}" if advice else ""
        raise ValueError(problem + remedy) from None


def _label_map(label_mapping: Mapping[str, float | str], names: list[str] | None) -> dict[str, str]:
    """evaluate's mapping, of the model's names to what the column holds, the way round that names are matched by."""

    def name_of(value: float | str) -> str:
        if isinstance(value, str) or value != int(value):
            return str(value)
        return names[int(value)] if names and 0 <= value < len(names) else str(int(value))

    label_map = {name_of(value): name for name, value in label_mapping.items()}
    if len(label_map) < len(label_mapping):
        raise ValueError(f"label_mapping: got {dict(label_mapping)}; allowed is another value for every label")
    return label_map
