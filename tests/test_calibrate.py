"""The whole job: a calibrator, and a report on rows that its fit has not seen."""

import json
import warnings

import pytest
import torch

from hf_calib import CALIBRATORS, IsotonicCalibration, TemperatureScaling, evaluate_calibration
from hf_calib.calibrate import METHODS, calibrate_predictions
from hf_calib.predictions import Predictions


NAMES = ["sad", "calm", "glad"]
T = 2.5
OF_THREE_CLASSES = [name for name in METHODS if name == "auto" or not CALIBRATORS[name].two_classes_only]


def overconfident(num_rows, seed, names=NAMES):
    """Logits `T * log p` for labels that are drawn from `p`, so that the right temperature is T."""
    generator = torch.Generator().manual_seed(seed)
    log_p = (1.5 * torch.randn(num_rows, 3, generator=generator)).log_softmax(-1)
    labels = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
    return Predictions(T * log_p, labels, names)


@pytest.fixture
def rows():
    return overconfident(600, seed=0)


def test_with_a_test_set_the_report_is_on_its_rows(rows):
    test = overconfident(400, seed=1)
    calibrator, report = calibrate_predictions(rows, method="temperature", test=test)
    wanted = evaluate_calibration(calibrator.log_probs(test.logits).exp(), test.labels, before=test.probs)
    assert report == wanted
    assert report.num_rows == 400
    assert abs(calibrator.temperature - T) < 0.3
    assert report.change["nll"].high < 0
    assert calibrator.provenance["report_rows"] == "other rows than those of the fit"


def test_without_one_every_row_is_calibrated_by_a_fit_on_others(rows):
    calibrator, report = calibrate_predictions(rows, method="temperature")
    assert report.num_rows == 600
    assert calibrator.temperature == TemperatureScaling().fit(rows.logits, rows.labels).temperature
    assert "cross-fitting" in calibrator.provenance["report_rows"]
    noise = Predictions(
        rows.logits, rows.labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))], NAMES
    )
    fitted, honest = calibrate_predictions(noise, method="isotonic")
    flattered = evaluate_calibration(fitted.log_probs(noise.logits).exp(), noise.labels)
    assert honest.after["nll"].value > flattered.after["nll"].value + 0.01
    assert honest.after["ece"].value > flattered.after["ece"].value


@pytest.mark.parametrize("method", OF_THREE_CLASSES)
def test_every_method_says_where_it_comes_from(method, rows):
    calibrator, report = calibrate_predictions(rows, method=method)
    assert method in ("auto", calibrator.name)
    assert calibrator.label_names == NAMES
    assert calibrator.provenance["rows"] == 600
    assert calibrator.provenance["fingerprint"] == rows.fingerprint()
    assert calibrator.provenance["scores"] == report.to_dict()
    assert ("selection" in calibrator.provenance) == (method == "auto")
    assert json.loads(json.dumps(calibrator.provenance)) == calibrator.provenance


def test_the_same_seed_gives_the_same_numbers(rows):
    first, again, other = (calibrate_predictions(rows, method="temperature", seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_what_cannot_be_done_is_refused(rows):
    with pytest.raises(
        ValueError, match="method: got 'plat'; allowed are auto, identity, temperature, ensemble_temperature"
    ):
        calibrate_predictions(rows, method="plat")
    with pytest.raises(ValueError, match=r"logits: got 3 classes; allowed for platt are 2. OneVsRest\(PlattScaling"):
        calibrate_predictions(rows, method="platt")
    with pytest.raises(ValueError, match=r"test: got labels \['calm', 'sad', 'glad'\]; allowed are \['sad', 'calm'"):
        calibrate_predictions(rows, test=overconfident(50, 1, ["calm", "sad", "glad"]))
    with pytest.raises(ValueError, match="test: got the rows of predictions; allowed are other ones"):
        calibrate_predictions(rows, test=overconfident(600, seed=0))
    with pytest.raises(ValueError, match="predictions: got 9 rows; allowed are 10 and more"):
        calibrate_predictions(Predictions(rows.logits[:9], rows.labels[:9], NAMES), method="isotonic")


def only(rows, classes):
    kept = torch.isin(rows.labels, torch.tensor(classes))
    return Predictions(rows.logits[kept], rows.labels[kept], NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_one_class_are_refused(method, rows):
    """Isotonic would learn that it always happens, and every held-out row of that class would agree."""
    with pytest.raises(ValueError, match="predictions: no label is sad or calm; allowed are rows of two classes"):
        calibrate_predictions(only(rows, [2]), method=method)


def test_a_missing_class_is_named(rows):
    with pytest.warns(UserWarning, match="no label is calm"):
        calibrate_predictions(only(rows, [0, 2]), method="temperature")


@pytest.mark.filterwarnings("ignore:.*no finite")
@pytest.mark.parametrize("method", OF_THREE_CLASSES)
def test_the_fewest_rows_are_enough_for_every_method(method, rows):
    few = Predictions(rows.logits[:10], rows.labels[:10], NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = calibrate_predictions(few, method=method).report.verdict()
    assert verdict.startswith(("10 rows are too few", "Nothing changed"))


def test_auto_takes_what_suits_the_rows(rows):
    assert isinstance(calibrate_predictions(rows)[0], TemperatureScaling)
    wavy = rows.logits + 3 * (2 * rows.logits).sin()
    calibrator, _ = calibrate_predictions(Predictions(wavy, rows.labels, NAMES), method="isotonic")
    assert isinstance(calibrator, IsotonicCalibration)
