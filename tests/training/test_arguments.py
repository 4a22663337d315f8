import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_calib.calibrators import CALIBRATORS
from hf_calib.functional.losses import focal_loss
from hf_calib.losses import LOSSES
from hf_calib.training import CalibrationTrainingArguments


def make(**kwargs):
    return CalibrationTrainingArguments(output_dir="out", use_cpu=True, **kwargs)


def test_added_and_changed_defaults():
    ours = {field.name: field.default for field in dataclasses.fields(CalibrationTrainingArguments)}
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    added = {key: value for key, value in ours.items() if key not in theirs or value != theirs[key]}
    assert added == {
        "calibration_loss": None,
        "calibration_loss_kwargs": None,
        "calibrator": "temperature",
        "mixup_alpha": 0.0,
        "mixup_weight": None,
    }
    for key, value in added.items():
        assert f"`{key}={json.dumps(value).replace('null', 'None')}`" in CalibrationTrainingArguments.__doc__


def test_from_the_command_line():
    parser = HfArgumentParser(CalibrationTrainingArguments)
    words = ["--output_dir", "out", "--use_cpu", "--calibration_loss", "focal", "--calibrator", "auto"]
    (args,) = parser.parse_args_into_dataclasses([*words, "--calibration_loss_kwargs", '{"gamma": 2.0}'])
    assert (args.calibration_loss, args.calibration_loss_kwargs, args.calibrator) == ("focal", {"gamma": 2.0}, "auto")
    (args,) = parser.parse_args_into_dataclasses(words[:3])
    assert (args.calibration_loss, args.calibration_loss_kwargs, args.calibrator) == (None, None, "temperature")
    assert ", ".join(LOSSES) in " ".join(parser.format_help().split())


def test_from_json_and_back(tmp_path):
    args = make(calibration_loss="label_smoothing", calibration_loss_kwargs={"label_smoothing": 0.1})
    path = tmp_path / "args.json"
    path.write_text(args.to_json_string())
    (again,) = HfArgumentParser(CalibrationTrainingArguments).parse_json_file(str(path))
    assert again.to_dict() == args.to_dict()
    path.write_text(json.dumps({"output_dir": "out", "use_cpu": True, "calibration_loss": "brier"}))
    (again,) = HfArgumentParser(CalibrationTrainingArguments).parse_json_file(str(path))
    assert again.calibration_loss == "brier"


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 2, 3]), np.array([1.0, 2, 3]), [1.0, 2, 3]])
def test_class_weights_are_written_as_json(weights):
    args = make(calibration_loss="focal", calibration_loss_kwargs={"class_weights": weights})
    assert json.loads(args.to_json_string())["calibration_loss_kwargs"] == {"class_weights": [1.0, 2.0, 3.0]}
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(
        args.make_loss()(logits, labels), focal_loss(logits, labels, class_weights=[1.0, 2, 3], reduction="sum")
    )


@pytest.mark.parametrize("name", ["refinement", "eval_nll", "eval_first_ece", "brier", "loss", "eval_loss"])
def test_scores_that_are_better_when_lower(name):
    assert make(metric_for_best_model=name).greater_is_better is False


def test_what_is_said_of_other_scores_is_kept():
    assert make(metric_for_best_model="eval_neg_nll", greater_is_better=True).greater_is_better is True


@pytest.mark.parametrize("name", ["accuracy", "eval_f1", "silence", "neg_nll"])
def test_others_are_left_to_transformers(name):
    assert make(metric_for_best_model=name).greater_is_better is True


def test_they_make_the_loss():
    focal = make(calibration_loss="focal", calibration_loss_kwargs='{"gamma": 2.0}').make_loss()
    assert repr(focal) == "FocalLoss(gamma=2.0, ignore_index=-100, reduction='sum')"
    assert repr(make().make_loss()) == "CrossEntropy(ignore_index=-100, reduction='sum')"


@pytest.mark.parametrize("name", ["auto", *CALIBRATORS])
def test_every_calibrator_is_allowed(name):
    assert make(calibrator=name).calibrator == name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"calibration_loss": "focall"}, "calibration_loss='focall'.*allowed are 'cross_entropy', 'label_smoothing'"),
        (
            {"calibration_loss": "focal", "calibration_loss_kwargs": {"gama": 2}},
            "calibration_loss_kwargs={'gama': 2}: .*got 'gama' = 2; allowed are 'gamma'",
        ),
        (
            {"calibration_loss": "focal", "calibration_loss_kwargs": {"gamma": -1}},
            "gamma: got -1; allowed are finite numbers from 0 up",
        ),
        (
            {"calibration_loss": "focal", "calibration_loss_kwargs": "gamma=2"},
            "calibration_loss_kwargs: got 'gamma=2'; allowed is a JSON object",
        ),
        (
            {"calibration_loss": "focal", "calibration_loss_kwargs": "[2]"},
            r"calibration_loss_kwargs: got '\[2\]'; allowed is a JSON object",
        ),
        (
            {"calibration_loss_kwargs": {"gamma": 2}},
            "calibration_loss_kwargs: got {'gamma': 2} without a",
        ),
        ({"calibration_loss": ["focal"]}, r"calibration_loss=\['focal'\].*allowed are 'cross_entropy'"),
        (
            {"metric_for_best_model": "refinement", "greater_is_better": True},
            "greater_is_better: got True, which keeps the worst where metric_for_best_model='refinement'; allowed is",
        ),
        ({"calibrator": "temprature"}, "calibrator: got 'temprature'; allowed are 'auto', .*'temperature'"),
        (
            {"label_smoothing_factor": 0.1, "calibration_loss": "focal"},
            "label_smoothing_factor: got 0.1; allowed is 0. Use calibration_loss='label_smoothing'",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1; allowed is 0"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
