"""Other packages' calibration methods, each as one function from calibration rows and test logits to probabilities.

Each is handed logits as its users would: a decision function to scikit-learn, probabilities to netcal, and logits or
probabilities, whichever it asks for, to probmetrics. Three of probmetrics' methods need further packages (betacal,
venn-abers, cir-model); where they are not installed the benchmark says so. Left out: its Dirichlet calibration, which
needs jax, and its "platt-logits", which in 1.3.0 refuses the logarithms that it makes itself.
"""

from collections.abc import Callable
from functools import partial

import netcal.binning
import netcal.scaling
import numpy as np
import torch
from probmetrics.calibrators import ETSCalibrator, get_calibrator
from probmetrics.distributions import CategoricalLogits
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, _TemperatureScaling
from sklearn.frozen import FrozenEstimator


# (calibration logits, their labels, test logits) -> probabilities of the test rows, float64
Peer = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class LogitsClassifier(ClassifierMixin, BaseEstimator):
    """To scikit-learn a fitted classifier, whose decision function is what it is handed."""

    def fit(self, logits: np.ndarray, labels: np.ndarray) -> "LogitsClassifier":
        """Takes note of the classes."""
        self.classes_ = np.unique(labels)
        return self

    def decision_function(self, logits: np.ndarray) -> np.ndarray:
        """The logits; of two classes their difference."""
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """The largest logit's class."""
        return self.classes_[logits.argmax(1)]


def sklearn_peer(method: str, logits: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """`CalibratedClassifierCV` on the classes that occur, which are all that it allows; the others get 0."""
    present, dense = np.unique(labels, return_inverse=True)
    logits = log_softmax(logits, axis=1)
    frozen = FrozenEstimator(LogitsClassifier().fit(logits[:, present], dense))
    fitted = CalibratedClassifierCV(frozen, method=method).fit(logits[:, present], dense)
    probs = np.zeros(test.shape)
    probs[:, present] = fitted.predict_proba(log_softmax(test, axis=1)[:, present])
    return probs


def sklearn_temperature(logits: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The part of `CalibratedClassifierCV` that fits a temperature: it also allows classes that do not occur."""
    return _TemperatureScaling().fit(log_softmax(logits, axis=1), labels).predict(log_softmax(test, axis=1))


def netcal_peer(make: Callable, logits: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """netcal, which takes the one probability of the second class where there are two."""
    probs, test_probs = softmax(logits, axis=1), softmax(test, axis=1)
    if probs.shape[1] > 2:
        return make().fit(probs, labels).transform(test_probs)
    right = np.reshape(make().fit(probs[:, 1], labels).transform(test_probs[:, 1]), -1)
    return np.stack([1 - right, right], axis=1)


def probmetrics_peer(make: Callable, logits: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """probmetrics, in its torch interface."""
    fitted = make().fit_torch(CategoricalLogits(torch.from_numpy(logits)), torch.from_numpy(labels))
    return fitted.predict_proba_torch(CategoricalLogits(torch.from_numpy(test))).get_probs().double().numpy()


def _probmetrics(name: str) -> Peer:
    return partial(probmetrics_peer, partial(get_calibrator, name))


BINNING, SCALING = netcal.binning, netcal.scaling
PEERS: dict[str, Peer] = {
    "scikit-learn sigmoid": partial(sklearn_peer, "sigmoid"),
    "scikit-learn isotonic": partial(sklearn_peer, "isotonic"),
    "scikit-learn temperature": sklearn_temperature,
    "netcal temperature": partial(netcal_peer, SCALING.TemperatureScaling),
    "netcal logistic": partial(netcal_peer, SCALING.LogisticCalibration),
    "netcal beta": partial(netcal_peer, SCALING.BetaCalibration),
    "netcal histogram": partial(netcal_peer, BINNING.HistogramBinning),
    "netcal isotonic": partial(netcal_peer, BINNING.IsotonicRegression),
    "netcal BBQ": partial(netcal_peer, BINNING.BBQ),
    "netcal ENIR": partial(netcal_peer, BINNING.ENIR),
    "probmetrics temperature": _probmetrics("temp-scaling"),
    "probmetrics temperature mix": _probmetrics("ts-mix"),
    "probmetrics ETS": partial(probmetrics_peer, ETSCalibrator),
    "probmetrics SVS": partial(probmetrics_peer, partial(get_calibrator, "svs", svs_print_init_info=False)),
    "probmetrics SMS": partial(probmetrics_peer, partial(get_calibrator, "sms", sms_print_init_info=False)),
    "probmetrics logistic": _probmetrics("logistic"),
    "probmetrics logistic mix": _probmetrics("logistic-mix"),
    "probmetrics isotonic": _probmetrics("isotonic"),
    "probmetrics Venn-Abers": _probmetrics("ivap"),
    "probmetrics centred isotonic": _probmetrics("cir"),
    "probmetrics affine": _probmetrics("affine-scaling"),
    "probmetrics quadratic": _probmetrics("quadratic-scaling"),
    "probmetrics beta": _probmetrics("beta"),
}
# They take two classes only; with more they are not run.
TWO_CLASS_PEERS = frozenset(f"probmetrics {name}" for name in ("affine", "quadratic", "beta"))
