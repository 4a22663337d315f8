"""Whether one set of probabilities is really better calibrated than another, as an `evaluate` comparison."""

import evaluate

from hf_calib.evaluate_modules.inputs import TensorInputs, row_features
from hf_calib.evaluate_modules.scores import comparison_scores


DESCRIPTION = """
Two sets of probabilities of the same rows, compared by a paired bootstrap: is the second really better calibrated than
the first, or could the difference be chance?
"""

INPUTS = """
Args:
    predictions1, predictions2: probabilities, never logits: (N, C) rows that sum to 1, (N,) probabilities of an event,
        (N, L) with task="multilabel", or (B, T, C). Arrays, tensors of any float dtype, or lists.
    references: class numbers (N,), outcomes 0 or 1 (N,), (N, L), or (B, T).
    metrics: a name, a list of names, or a dictionary of names and options such as {"ece": {"num_bins": 10}}.
    task: None, or "multilabel".
    ignore_index: rows with this reference are left out; -100 by default.
    num_resamples, seed: of the bootstrap; 1000 and 0 by default.
Returns:
    Per metric "..._value1", "..._value2", "..._change" and its 95 % interval, "..._low" to "..._high"; and better (1
    where NLL falls for real, otherwise 0), verdict (a sentence) and num_rows.
"""

CITATION = """
@book{efron1993bootstrap,
  title={An Introduction to the Bootstrap},
  author={Efron, Bradley and Tibshirani, Robert J.},
  publisher={Chapman and Hall},
  year={1993}
}
"""


class CalibrationComparison(TensorInputs, evaluate.Comparison):
    """Takes rows as `TensorInputs` does, and computes what `comparison_scores` does."""

    scores = staticmethod(comparison_scores)

    def _info(self):
        info = evaluate.ComparisonInfo(
            module_type="comparison",
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=row_features("predictions1", "predictions2"),
        )
        info.format = "arrow"  # its constructor refuses formats of lists, but stored rows need not become Python lists
        return info
