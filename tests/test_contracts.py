"""The laws of every calibrator, and for each law a calibrator that breaks it, to see it fail."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from hf_calib.calibrators import (
    CALIBRATORS,
    AutoCalibrator,
    Calibrator,
    Chain,
    Ensemble,
    IdentityCalibration,
    IsotonicCalibration,
    OneVsRest,
    TemperatureScaling,
)
from hf_calib.functional import negative_log_likelihood


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INF = torch.inf
LOWEST = torch.finfo(torch.float32).min  # what many models write in place of -inf


def problem(seed=0, rows=300, classes=4, scale=2.5, dtype=torch.float64):
    """Logits that are too sure of themselves by `scale`, and labels drawn from the true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, classes, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
    labels = log_p.exp().multinomial(1, generator=generator)[:, 0]
    return (scale * log_p).to(dtype), labels


def masked(value=-INF, dtype=torch.float64):
    """A problem in which two of six classes cannot occur, other ones in each half of the rows."""
    logits, labels = problem(1)
    columns = torch.tensor([0, 1, 2, 3]).repeat(len(labels), 1)
    columns[150:] += 2
    wide = torch.full((len(labels), 6), value, dtype=torch.float64)
    return wide.scatter(-1, columns, logits).to(dtype), columns.gather(-1, labels[:, None])[:, 0]


def made(kind, *members, **settings):
    """A kind of calibrator whose constructor needs no arguments, as the laws want it."""
    maker = partial(kind, *members, **settings)
    maker.contains_identity = kind.contains_identity
    maker.preserves_accuracy = kind.preserves_accuracy
    return maker


def kinds():
    """Every calibrator by name, lifted where it is for two classes."""
    found = {}
    for name, kind in CALIBRATORS.items():
        found[name] = made(OneVsRest, kind()) if kind.two_classes_only else kind
    pair = [TemperatureScaling(), IsotonicCalibration()]
    return found | {"chain": made(Chain, pair), "ensemble": made(Ensemble, [IdentityCalibration(), *pair])}


KINDS = kinds()


def fitted(kind, *data, **options):
    """A fitted calibrator; whatever it warns of is not this law's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return kind().fit(*data, **options)


def assert_same(calibrator, other, logits):
    """Equal bits: the state and what it does."""
    assert (calibrator.num_labels, calibrator.provenance) == (other.num_labels, other.provenance)
    assert calibrator.tensors().keys() == other.tensors().keys()
    for name, tensor in calibrator.tensors().items():
        assert tensor.dtype == other.tensors()[name].dtype
        assert torch.equal(tensor, other.tensors()[name])
    assert torch.equal(calibrator(logits), other(logits))


def assert_close(calibrator, other, logits, atol=1e-4):
    """Equal probabilities, to what a search for the optimum may leave."""
    probs, expected = calibrator.log_probs(logits).exp(), other.log_probs(logits).exp()
    torch.testing.assert_close(probs, expected, atol=atol, rtol=0)


def assert_defined(calibrator, logits):
    """Finite where the logits are, -inf where they are; probabilities that sum to 1."""
    calibrated = calibrator(logits)
    assert torch.equal(calibrated == -INF, logits == -INF)
    assert torch.equal(calibrated.isfinite(), logits.isfinite())
    probs = calibrator.log_probs(logits).exp()
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))


# -- fitting


def fit_returns_self(kind, folder):
    calibrator = kind()
    assert calibrator.fit(*problem()) is calibrator
    assert calibrator.num_labels == 4
    assert calibrator.provenance["rows"] == 300


def inputs_are_untouched(kind, folder):
    for dtype in DTYPES:
        logits, labels = masked(dtype=dtype)
        weights = torch.ones(len(labels))
        before = [tensor.clone() for tensor in (logits, labels, weights)]
        kind().fit(logits, labels, sample_weight=weights)(logits)
        assert all(torch.equal(*pair) for pair in zip(before, (logits, labels, weights), strict=True))


def row_order_is_irrelevant(kind, folder):
    for rows in (300, 5000):
        logits, labels = problem(rows=rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        for other in (order, torch.arange(rows).flip(0)):
            assert_close(kind().fit(logits, labels), kind().fit(logits[other], labels[other]), logits)


def refit_equals_fresh_fit(kind, folder):
    logits, labels = problem()
    refitted = kind().fit(*problem(3, classes=7, scale=0.4)).fit(logits, labels)
    assert_same(refitted, kind().fit(logits, labels), logits)


def failed_fit_changes_nothing(kind, folder):
    logits, labels = problem()
    calibrator = kind().fit(logits, labels)
    before = copy.deepcopy(calibrator)
    for wrong in (logits.masked_fill(logits == logits[7, 1], torch.nan), logits[:, :2]):
        with pytest.raises(ValueError, match=r"logits|labels"):
            calibrator.fit(wrong, labels)
    assert_same(calibrator, before, logits)


def ignored_rows_have_no_influence(kind, folder):
    logits, labels = problem()
    for ignore_index in (-100, 2):
        ignored = (torch.arange(len(labels)) % 3 == 0) | (labels == ignore_index)
        junk = logits.masked_fill(ignored[:, None], torch.nan)
        marked = labels.masked_fill(ignored, ignore_index)
        calibrator = kind().fit(junk, marked, ignore_index=ignore_index)
        assert_same(calibrator, kind().fit(logits[~ignored], labels[~ignored]), logits)


def integer_weights_repeat_rows(kind, folder):
    logits, labels = problem()
    weights = torch.arange(len(labels)) % 4
    repeated = kind().fit(logits.repeat_interleave(weights, 0), labels.repeat_interleave(weights))
    assert_close(kind().fit(logits, labels, sample_weight=weights), repeated, logits)


def weight_0_leaves_out(kind, folder):
    logits, labels = problem()
    kept = torch.arange(len(labels)) % 3 > 0
    weighted = kind().fit(logits, labels, sample_weight=kept.float())
    assert_same(weighted, kind().fit(logits[kept], labels[kept]), logits)


def the_unit_of_weights_is_free(kind, folder):
    logits, labels = problem()
    weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    for unit in (1e-300, 1e307):
        calibrator = kind().fit(logits, labels, sample_weight=weights * unit)
        assert_close(calibrator, kind().fit(logits, labels, sample_weight=weights), logits)


def soft_labels_of_one_class_are_hard(kind, folder):
    logits, labels = problem()
    soft = nn.functional.one_hot(labels, 4).double()
    soft[::7], labels[::7] = -100, -100
    found, expected = kind().fit(logits, soft), kind().fit(logits, labels)
    assert found.provenance == expected.provenance
    assert_close(found, expected, logits, atol=1e-9)


def one_logit_is_two_classes(kind, folder):
    logits, labels = problem(classes=2)
    binary, pair = kind(task="binary").fit(logits[:, 1] - logits[:, 0], labels), kind().fit(logits, labels)
    assert binary.num_labels == 1
    torch.testing.assert_close(
        binary(logits[:, 1:] - logits[:, :1]).sigmoid(), pair(logits).softmax(-1)[:, 1:], atol=1e-5, rtol=1e-5
    )


def labels_are_calibrated_one_by_one(kind, folder):
    logits, labels = problem()
    events = nn.functional.one_hot(labels, 4)[:, :2]
    several = kind(task="multilabel").fit(logits[:, :2], events)
    several.save_pretrained(folder)
    assert several.num_labels == 2
    for k in range(2):
        alone = kind(task="binary").fit(logits[:, k], events[:, k])
        assert torch.equal(several(logits[:, :2])[:, k], alone(logits[:, k]))
    assert torch.equal(AutoCalibrator.from_pretrained(folder)(logits[:, :2]), several(logits[:, :2]))


def leading_dimensions_are_free(kind, folder):
    logits, labels = problem()
    calibrator = kind().fit(logits, labels)
    assert_same(kind().fit(logits.reshape(3, 50, 2, 4), labels.reshape(3, 50, 2)), calibrator, logits)
    expected = calibrator(logits)
    for shape in ((300, 4), (3, 50, 2, 4), (1, 300, 4)):
        assert torch.equal(calibrator(logits.reshape(shape)), expected.reshape(shape))
    torch.testing.assert_close(calibrator(logits[0]), expected[0])
    assert calibrator(logits[:0]).shape == (0, 4)


def the_dtype_of_the_fit_is_irrelevant(kind, folder):
    for dtype in DTYPES:
        logits, labels = problem(dtype=dtype)
        assert_close(kind().fit(logits, labels), kind().fit(logits.double(), labels), logits.double())


def a_fit_leaves_no_graph(kind, folder):
    logits, labels = problem()
    weights = torch.ones(len(labels), requires_grad=True)
    calibrator = kind().fit(logits.requires_grad_(), labels, sample_weight=weights)
    assert not any(tensor.requires_grad for tensor in calibrator.tensors().values())


# -- what it promises


def shifts_are_irrelevant(kind, folder):
    logits, labels = problem()
    shift = torch.linspace(-40, 40, len(labels), dtype=torch.float64)[:, None]
    calibrator = kind().fit(logits, labels)
    expected = calibrator(logits).softmax(-1)
    for moved in (logits + shift, logits.log_softmax(-1)):
        torch.testing.assert_close(calibrator(moved).softmax(-1), expected, atol=1e-7, rtol=0)
        assert_close(kind().fit(moved, labels), calibrator, logits)


def probabilities_are_finite_and_normalised(kind, folder):
    for dtype in DTYPES:
        calibrator = kind().fit(*problem(dtype=dtype))
        largest = torch.finfo(dtype).max
        extreme = torch.tensor([[largest / 2, 0, 0, 1], [-largest, 0, 1, 2], [0, 0, 0, 0]], dtype=dtype)
        for logits in (problem(5, dtype=dtype)[0], extreme):
            assert_defined(calibrator, logits)


def impossible_stays_impossible(kind, folder):
    for dtype in DTYPES:
        logits, labels = masked(dtype=dtype)
        calibrator = kind().fit(logits, labels)
        nothing, only_one = torch.full((2, 6), -INF, dtype=dtype).unbind()
        only_one[3] = 1
        assert_defined(calibrator, logits)
        assert_defined(calibrator, only_one)
        assert torch.equal(calibrator(nothing), nothing)


def nan_stays_nan(kind, folder):
    logits, labels = problem()
    logits_with_nan = logits[:2].clone()
    logits_with_nan[0, 1] = torch.nan
    assert kind().fit(logits, labels).log_probs(logits_with_nan).isnan().any(-1).tolist() == [True, False]


def never_worse_than_identity_on_its_own_rows(kind, folder):
    if not kind.contains_identity:
        return
    weights = torch.arange(300) % 5 + 0.5
    rows = [problem(seed, scale=scale) for seed, scale in enumerate((1.0, 2.5, 0.3, 1e-3, 1e3))]
    rows += [masked(value, torch.float32) for value in (-INF, -1e4, -1e9, -1e12, LOWEST)]
    rows += [AWKWARD[name] for name in ("separable", "anti-correlated", "separable but for a tie")]
    for logits, labels in rows:
        for weight in (torch.ones(len(labels)), weights[: len(labels)]):
            calibrator = fitted(kind, logits, labels, sample_weight=weight)
            nll, before = (
                negative_log_likelihood(log_probs=log_probs, labels=labels, reduction="none") @ weight.double()
                for log_probs in (calibrator.log_probs(logits), logits.log_softmax(-1))
            )
            assert nll <= before + 1e-6 * weight.sum()


def the_most_probable_class_stays(kind, folder):
    if not kind.preserves_accuracy:
        return
    for dtype in DTYPES:
        for logits, labels in (problem(dtype=dtype), masked(dtype=dtype), problem(scale=0.1, dtype=dtype)):
            calibrated = kind().fit(logits, labels)(logits)
            best = logits.argmax(-1, keepdim=True)
            assert torch.equal(calibrated.gather(-1, best), calibrated.amax(-1, keepdim=True))  # rounding may tie
            if dtype == torch.float64:
                assert torch.equal(calibrated.argmax(-1, keepdim=True), best)


# -- precision, devices and modules


def dtypes_are_kept(kind, folder):
    calibrator = kind().fit(*problem(dtype=torch.float32))
    for dtype in DTYPES:
        logits = problem(5, dtype=dtype)[0]
        assert calibrator(logits).dtype == dtype
        assert calibrator.log_probs(logits).dtype == torch.promote_types(dtype, torch.float32)
        wide = calibrator(logits.double())
        torch.testing.assert_close(calibrator(logits).double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def casting_a_model_does_not_round_it(kind, folder):
    logits, labels = problem()
    calibrator = kind().fit(logits, labels)
    before = copy.deepcopy(calibrator)
    model = nn.Sequential(nn.Linear(2, 2), calibrator)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        assert model.to(cast)[0].weight.dtype == cast
        assert_same(calibrator, before, logits)


def the_device_is_followed(kind, folder):
    logits, labels = problem()
    calibrator = kind().fit(logits, labels)
    dtypes = [tensor.dtype for tensor in calibrator.tensors().values()]
    assert all(tensor.device == logits.device for tensor in calibrator.tensors().values())
    assert calibrator(logits).device == logits.device
    calibrator.to("meta")
    assert all(tensor.is_meta for tensor in calibrator.tensors().values())
    assert [tensor.dtype for tensor in calibrator.tensors().values()] == dtypes
    assert calibrator(logits.to("meta")).is_meta
    assert "num_labels=4" in repr(calibrator)


def weights_files_stay_free_of_it(kind, folder):
    calibrator = kind().fit(*problem())
    assert not nn.Sequential(calibrator).state_dict()
    assert not list(calibrator.parameters())
    assert not calibrator.load_state_dict({}).missing_keys


def deepcopy_is_independent(kind, folder):
    logits, labels = problem()
    calibrator = kind().fit(logits, labels)
    twin = copy.deepcopy(calibrator)
    assert_same(twin, calibrator, logits)
    twin.fit(*problem(3, classes=5))
    assert_same(calibrator, kind().fit(logits, labels), logits)


# -- errors


def unfitted_is_a_clear_error(kind, folder):
    for use in (kind(), kind().log_probs):
        with pytest.raises(ValueError, match="not fitted"):
            use(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not fitted"):
        kind().save_pretrained(folder)
    assert not list(folder.iterdir())


def wrong_logits_are_a_clear_error(kind, folder):
    calibrator = kind().fit(*problem())
    with pytest.raises(ValueError, match=r"^logits: got 5 classes; this calibrator was fitted on 4"):
        calibrator(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"^logits: got torch.int64"):
        calibrator(torch.zeros(2, 4, dtype=torch.int64))


# -- files


def save_then_load_gives_equal_bits(kind, folder):
    for dtype in (torch.float32, torch.float64):
        logits, labels = problem(dtype=dtype)
        calibrator = kind().fit(logits, labels)
        calibrator.label_names = ["a", "b", "ü", "d"]
        calibrator.provenance |= {"data": "held out", "scores": {"nll": 0.1 + 0.2}}
        calibrator.save_pretrained(folder / "new" / "folder")
        loaded = AutoCalibrator.from_pretrained(folder / "new" / "folder")
        assert type(loaded) is type(calibrator)
        assert loaded.label_names == calibrator.label_names
        assert_same(loaded, calibrator, logits)


def saving_again_changes_no_byte(kind, folder):
    kind().fit(*masked()).save_pretrained(folder / "first")
    for old, new in (("first", "second"), ("second", "third")):
        AutoCalibrator.from_pretrained(folder / old).save_pretrained(folder / new)
        for name in ("calibrator.json", "calibrator.safetensors"):
            assert (folder / old / name).read_bytes() == (folder / new / name).read_bytes()


LAWS = (
    fit_returns_self,
    inputs_are_untouched,
    row_order_is_irrelevant,
    refit_equals_fresh_fit,
    failed_fit_changes_nothing,
    ignored_rows_have_no_influence,
    integer_weights_repeat_rows,
    weight_0_leaves_out,
    the_unit_of_weights_is_free,
    soft_labels_of_one_class_are_hard,
    one_logit_is_two_classes,
    labels_are_calibrated_one_by_one,
    leading_dimensions_are_free,
    the_dtype_of_the_fit_is_irrelevant,
    a_fit_leaves_no_graph,
    shifts_are_irrelevant,
    probabilities_are_finite_and_normalised,
    impossible_stays_impossible,
    nan_stays_nan,
    never_worse_than_identity_on_its_own_rows,
    the_most_probable_class_stays,
    dtypes_are_kept,
    casting_a_model_does_not_round_it,
    the_device_is_followed,
    weights_files_stay_free_of_it,
    deepcopy_is_independent,
    unfitted_is_a_clear_error,
    wrong_logits_are_a_clear_error,
    save_then_load_gives_equal_bits,
    saving_again_changes_no_byte,
)


EXCEPTIONS = {
    # its weights come from folds, into which rows are dealt by their places
    "ensemble": (row_order_is_irrelevant, integer_weights_repeat_rows),
    # their penalties depend on the number of rows
    "structured_vector": (integer_weights_repeat_rows,),
    "structured_matrix": (integer_weights_repeat_rows,),
    # the row in question weighs as much as those of the fit do on average
    "venn_abers": (integer_weights_repeat_rows,),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of classes that can be separated, which is no law's business
@pytest.mark.parametrize(
    ("name", "law"),
    [(name, law) for name in KINDS for law in LAWS if law not in EXCEPTIONS.get(name, ())],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_law(name, law, tmp_path):
    law(KINDS[name], tmp_path)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_method_is_a_name(name):
    assert CALIBRATORS[name].name == name
    assert issubclass(CALIBRATORS[name], Calibrator)


# -- awkward data: a defined result, or an error that names the argument

EYE, FOUR = torch.eye(4), torch.arange(4)
AWKWARD = {
    "a class that the labels miss": (problem()[0], problem()[1] % 3),
    "one class only": (problem()[0], torch.zeros(300, dtype=torch.int64)),
    "one row, right": (torch.tensor([[1.0, 2, 3]]), torch.tensor([2])),
    "one row, wrong": (torch.tensor([[1.0, 2, 3]]), torch.tensor([0])),
    "huge": (1e30 * problem()[0], problem()[1]),
    "huge float32": (1e30 * problem(dtype=torch.float32)[0], problem()[1]),
    "the largest float32": (problem(dtype=torch.float32)[0].sign() * -LOWEST, problem()[1]),
    "the largest float16": (torch.tensor([[65504.0, -65504], [-65504, 65504]] * 2).half(), torch.tensor([0, 1, 1, 0])),
    "subnormal": (1e-40 * problem(dtype=torch.float32)[0], problem()[1]),
    "subnormal float64": (1e-310 * problem()[0], problem()[1]),
    "constant": (torch.full((6, 3), 7.0), torch.tensor([0, 1, 2, 0, 1, 2])),
    "constant of one class": (torch.full((6, 3), 7.0), torch.zeros(6, dtype=torch.int64)),
    "separable": (10 * EYE, FOUR),
    "separable but for a tie": (torch.tensor([[3.0, 0], [4, 0], [0, 5], [1, 1]]), torch.tensor([0, 0, 1, 1])),
    "anti-correlated": (10 * EYE, FOUR.flip(0)),
    "one class possible": (torch.zeros(4, 4).masked_fill(EYE == 0, -INF), FOUR),
    "masks of the lowest float32": masked(LOWEST, torch.float32),
    "two classes": problem(classes=2),
    "more classes than rows": problem(rows=3, classes=50),
}
REFUSED = {
    "no row": (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "labels: no row"),
    "ignored rows only": (EYE, torch.full((4,), -100), "labels: no row"),
    "NaN": (EYE.masked_fill(EYE == 1, torch.nan), FOUR, "logits: the largest of row 0 is nan"),
    "+inf": (
        torch.where(FOUR[:, None] == 2, EYE / 0, EYE).nan_to_num(nan=0, posinf=INF),
        FOUR,
        "logits: .* row 2 .* inf",
    ),
    "an impossible row": (torch.full((4, 4), -INF), FOUR, "logits: the largest of row 0 is -inf"),
    "an impossible label": (EYE.masked_fill(EYE == 1, -INF), FOUR, "labels: row 0 has class 0"),
    "a label too high": (EYE, FOUR + 1, "labels: got 4"),
    "a label too low": (EYE, FOUR - 1, "labels: got -1"),
    "no labels": (EYE, None, "labels: got NoneType"),
    "floating labels": (EYE, FOUR.float(), "labels: got a torch.float32 tensor"),
    "integer logits": (EYE.long(), FOUR, "logits: got a torch.int64 tensor"),
    "an array": (EYE.numpy(), FOUR, "logits: got ndarray"),
    "a list": ([[0.0, 1.0]], FOUR, "logits: got list"),
    "one column": (EYE[:, :1], FOUR, "logits: got shape"),
    "fewer labels than rows": (EYE, FOUR[:3], "logits: got shape"),
}
REFUSED_WEIGHTS = {
    "negative": torch.tensor([1.0, -1, 1, 1]),
    "NaN": torch.tensor([1.0, torch.nan, 1, 1]),
    "infinite": torch.tensor([1.0, INF, 1, 1]),
    "of another shape": torch.ones(4, 1),
    "a list": [1.0, 1.0, 1.0, 1.0],
}


NAMES = tuple(f"{name}:" for name in CALIBRATORS)  # how warnings begin, also where a member warns


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("name", KINDS)
def test_awkward_rows_give_a_defined_result_or_an_error_that_names_the_argument(name, case):
    logits, labels = AWKWARD[case]
    refusal = ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            calibrator = KINDS[name]().fit(logits, labels)
        except ValueError as error:
            refusal = str(error)
    if refusal:
        assert refusal.startswith(("logits:", "labels:", "num_folds:"))
        return
    assert all(str(warning.message).startswith(NAMES) and warning.filename == __file__ for warning in warned)
    assert all(tensor.isfinite().all() for tensor in calibrator.tensors().values())
    assert_defined(calibrator, logits)
    assert_defined(calibrator, problem(classes=logits.shape[-1], dtype=logits.dtype)[0])


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", KINDS)
def test_wrong_rows_are_an_error_that_names_the_argument(name, case):
    logits, labels, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        KINDS[name]().fit(logits, labels)


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
@pytest.mark.parametrize("name", KINDS)
def test_wrong_weights_are_an_error_that_names_the_argument(name, case):
    with pytest.raises(ValueError, match=r"^sample_weight: got"):
        KINDS[name]().fit(EYE, FOUR, sample_weight=REFUSED_WEIGHTS[case])


@pytest.mark.parametrize("name", KINDS)
def test_an_error_counts_the_rows_that_were_given(name):
    logits = EYE.clone()
    logits[3, 0] = torch.nan
    with pytest.raises(ValueError, match="row 3 is nan"):
        KINDS[name]().fit(logits, torch.tensor([-100, 1, -100, 3]))


# -- the laws can fail: a temperature with one method replaced, for each of them


def super_fit(self, logits, labels, **options):
    return TemperatureScaling.fit(self, logits, labels, **options)


def clears_before_it_checks(self, *args, **options):
    self.num_labels = None
    return super_fit(self, *args, **options)


def takes_ignored_rows(self, logits, labels, ignore_index=-100):
    return super_fit(self, logits.nan_to_num(), labels.clamp_min(0))


def takes_rows_of_weight_0(self, logits, labels, sample_weight=None):
    return super_fit(self, logits, labels, sample_weight=None if sample_weight is None else sample_weight + 0.1)


def takes_the_unit_of_weights(self, logits, labels, sample_weight=None):
    super_fit(self, logits, labels, sample_weight=sample_weight)
    self.temperature += sample_weight.sum().log().float()
    return self


def keeps_the_graph(self, logits, labels, sample_weight=None):
    super_fit(self, logits, labels)
    self.temperature = logits.std().float()
    return self


def rounds_in_the_inputs_dtype(self, logits, labels, weights):
    return {"temperature": (logits[0, 0] / 3).float()}


def weighs_soft_rows_otherwise(self, rows):
    if rows.labels.is_floating_point():
        rows = rows._replace(weights=torch.arange(len(rows.weights)).double() + 1)
    return TemperatureScaling._fit_rows(self, rows)


def has_a_weight(self, **options):
    TemperatureScaling.__init__(self, **options)
    self.register_buffer("extra", torch.zeros(()))


def starts_fitted(self, **options):
    TemperatureScaling.__init__(self, **options)
    self.set_tensors({"temperature": torch.tensor(1.0)}, num_labels=4)


def saves_less(self, path):
    rounded = copy.deepcopy(self)
    rounded.temperature = self.temperature.half().float()
    TemperatureScaling.save_pretrained(rounded, path)


def counts_its_saves(self, path):
    self.provenance["saves"] = self.provenance.get("saves", 0) + 1
    TemperatureScaling.save_pretrained(self, path)


best_t = TemperatureScaling._fit
z_over_t = TemperatureScaling._calibrate
BROKEN = {
    fit_returns_self: {"fit": lambda self, *data: None},
    inputs_are_untouched: {"_fit": lambda self, z, y, w: best_t(self, z.mul_(2), y, w)},
    row_order_is_irrelevant: {"_fit": lambda self, z, y, w: {"temperature": z[0].exp().sum().float()}},
    refit_equals_fresh_fit: {"_fit": lambda self, z, y, w: {"temperature": torch.tensor(2.0 + bool(self.num_labels))}},
    failed_fit_changes_nothing: {"fit": clears_before_it_checks},
    ignored_rows_have_no_influence: {"fit": takes_ignored_rows},
    integer_weights_repeat_rows: {"_fit": lambda self, z, y, w: best_t(self, z, y, torch.ones_like(w))},
    weight_0_leaves_out: {"fit": takes_rows_of_weight_0},
    the_unit_of_weights_is_free: {"fit": takes_the_unit_of_weights},
    soft_labels_of_one_class_are_hard: {"_fit_rows": weighs_soft_rows_otherwise},
    one_logit_is_two_classes: {"_fit": lambda self, z, y, w: {"temperature": torch.tensor(2.0 + bool(self.task))}},
    labels_are_calibrated_one_by_one: {"_unfitted": lambda self, n: [IsotonicCalibration(task="binary")] * n},
    leading_dimensions_are_free: {"_calibrate": lambda self, z: z_over_t(self, z) - z.amax(0)},
    the_dtype_of_the_fit_is_irrelevant: {"_fit": rounds_in_the_inputs_dtype},
    a_fit_leaves_no_graph: {"fit": keeps_the_graph},
    shifts_are_irrelevant: {"_calibrate": lambda self, z: z.square()},
    probabilities_are_finite_and_normalised: {"_calibrate": lambda self, z: z * 4},
    impossible_stays_impossible: {"_calibrate": lambda self, z: z_over_t(self, z).nan_to_num()},
    nan_stays_nan: {"_calibrate": lambda self, z: z_over_t(self, z).nan_to_num()},
    never_worse_than_identity_on_its_own_rows: {"_fit": lambda self, z, y, w: {"temperature": torch.tensor(100.0)}},
    the_most_probable_class_stays: {"_calibrate": lambda self, z: -z_over_t(self, z)},
    dtypes_are_kept: {"_calibrate": lambda self, z: z.double() / self.temperature},
    casting_a_model_does_not_round_it: {"_apply": nn.Module._apply},
    the_device_is_followed: {"_apply": lambda self, fn: self},
    weights_files_stay_free_of_it: {"__init__": has_a_weight},
    deepcopy_is_independent: {"__deepcopy__": lambda self, memo: self},
    unfitted_is_a_clear_error: {"__init__": starts_fitted},
    wrong_logits_are_a_clear_error: {"forward": lambda self, z: z},
    save_then_load_gives_equal_bits: {"save_pretrained": saves_less},
    saving_again_changes_no_byte: {"save_pretrained": counts_its_saves},
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_each_law_can_fail(law, tmp_path, monkeypatch):
    broken = type("Broken", (TemperatureScaling,), BROKEN[law])
    monkeypatch.setitem(CALIBRATORS, "temperature", broken)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(broken, tmp_path)
