"""How far a classifier's probabilities can be trusted, as an `evaluate` metric."""

import evaluate

from hf_calib.evaluate_modules.inputs import TensorInputs, row_features
from hf_calib.evaluate_modules.scores import calibration_scores


DESCRIPTION = """
Calibration of probabilities: how often is the model right when it says 0.9? Calibration errors (ECE and others),
proper scores (NLL, Brier) and more, with bootstrap intervals, and before and after a calibrator.
"""

INPUTS = """
Args:
    predictions: probabilities, never logits: (N, C) rows that sum to 1, (N,) probabilities of an event, (N, L) with
        task="multilabel", or (B, T, C). Arrays, tensors of any float dtype, or lists.
    references: class numbers (N,), outcomes 0 or 1 (N,), (N, L), or (B, T).
    metrics: a name, a list of names, or a dictionary of names and options such as {"ece": {"num_bins": 10}}.
    task: None, or "multilabel".
    ignore_index: rows with this reference are left out; -100 by default.
    calibrator: a fitted hf_calib calibrator, its folder or its Hub repo id: adds every key once more, "before_...".
    intervals: True adds the ends of 95 % bootstrap intervals, "..._low" and "..._high".
    num_resamples, seed: of the bootstrap; 1000 and 0 by default.
Returns:
    One float per metric, and num_rows.
"""

CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
"""


class Calibration(TensorInputs, evaluate.Metric):
    """Takes rows as `TensorInputs` does, and computes what `calibration_scores` does."""

    scores = staticmethod(calibration_scores)

    def _info(self):
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=row_features("predictions"),
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )
        info.format = "arrow"  # its constructor refuses formats of lists, but stored rows need not become Python lists
        return info
