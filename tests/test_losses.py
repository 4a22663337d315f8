import inspect
import pickle

import pytest
import torch

import hf_calib.functional as functional
from hf_calib.losses import ADDITIVE, LOSSES, CrossEntropy, FocalLoss, make_loss


LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, -100, 1, 2, 2])


def test_those_that_are_no_sums_over_rows():
    assert set(LOSSES) - set(ADDITIVE) == {"mmce", "soft_binned_ece", "mdca"}


@pytest.mark.parametrize("name", LOSSES)
def test_sums_over_a_split_are_the_whole_where_it_is_said(name):
    loss = make_loss(name, reduction="sum")
    parts = [loss(LOGITS[rows], LABELS[rows]) for rows in (slice(2), slice(2, None))]
    assert torch.isclose(sum(parts), loss(LOGITS, LABELS), rtol=1e-5) == (name in ADDITIVE)


@pytest.mark.parametrize("name", LOSSES)
def test_a_module_is_its_function(name):
    function = getattr(functional, f"{name}_loss")
    for reduction in ("mean", "sum", "none"):
        expected = function(LOGITS, LABELS, reduction=reduction)
        assert torch.equal(LOSSES[name](reduction=reduction)(LOGITS, LABELS), expected)
        assert torch.equal(make_loss(name, reduction=reduction)(LOGITS, LABELS), expected)
    assert torch.equal(LOSSES[name](ignore_index=2)(LOGITS[3:], LABELS[3:]), function(LOGITS[3:4], LABELS[3:4]))


@pytest.mark.parametrize("name", LOSSES)
def test_defaults_are_the_functions_defaults(name):
    of_function = inspect.signature(getattr(functional, f"{name}_loss")).parameters
    of_module = inspect.signature(LOSSES[name]).parameters
    assert {key: p.default for key, p in of_module.items()} == {key: of_function[key].default for key in of_module}
    assert list(of_module) == list(of_function)[2:]


@pytest.mark.parametrize("name", LOSSES)
def test_a_module_has_nothing_to_train_or_save(name):
    loss = make_loss(name)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    copy = pickle.loads(pickle.dumps(loss))
    assert torch.equal(copy(LOGITS, LABELS), loss(LOGITS, LABELS))


def test_hyperparameters_reach_the_function():
    assert torch.equal(FocalLoss(gamma=1.5)(LOGITS, LABELS), functional.focal_loss(LOGITS, LABELS, gamma=1.5))
    smoothed = make_loss("label_smoothing", {"label_smoothing": 0.3}, reduction="sum")
    expected = functional.label_smoothing_loss(LOGITS, LABELS, label_smoothing=0.3, reduction="sum")
    assert torch.equal(smoothed(LOGITS, LABELS), expected)
    weighted = make_loss("focal", {"class_weights": [1, 2, 1, 1]}, reduction="sum")
    assert weighted(LOGITS, LABELS) == functional.focal_loss(
        LOGITS, LABELS, class_weights=[1, 2, 1, 1], reduction="sum"
    )
    assert repr(smoothed) == "LabelSmoothing(label_smoothing=0.3, ignore_index=-100, reduction='sum')"


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "focall",
            None,
            "name: got 'focall'; allowed are 'cross_entropy', 'label_smoothing', 'margin_label_smoothing'",
        ),
        ("focal", {"gama": 2}, "kwargs of 'focal': got 'gama' = 2; allowed are 'gamma', 'class_weights'$"),
        ("brier", {"gamma": 2}, "kwargs of 'brier': got 'gamma' = 2; allowed are 'class_weights'$"),
        ("brier", {"class_weights": [1, -1]}, r"class_weights: got \[1.0, -1.0\]; allowed are finite numbers"),
        ("focal", {"reduction": "mean"}, "kwargs of 'focal': got 'reduction' = 'mean'; allowed are 'gamma'"),
        ("focal", {"ignore_index": 0}, "kwargs of 'focal': got 'ignore_index' = 0; allowed are 'gamma'"),
        ("focal", "gamma=2", "kwargs: got 'gamma=2'; allowed are None and a dict"),
        ("focal", {"gamma": -1}, "gamma: got -1; allowed are finite numbers from 0 up"),
        ("label_smoothing", {"label_smoothing": 1}, r"label_smoothing: got 1; allowed are numbers in \[0, 1\)"),
    ],
)
def test_make_loss_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, kwargs)


def test_a_module_refuses_when_it_is_made():
    with pytest.raises(ValueError, match="reduction: got 'average'"):
        CrossEntropy(reduction="average")
    with torch.device("meta"):  # a default device that has no values to check
        assert FocalLoss(gamma=2.0).settings["gamma"] == 2.0
