"""Runs `hf-calib demo` and keeps what the README shows of it: the report, the model card and the picture.

The report goes to `results/demo.json`, the card and the picture to `model_cards/`.

    python examples/benchmarks/demo.py
"""

import json
import shutil
import tempfile
from pathlib import Path

from environment import write_result

from hf_calib.demo import run_demo


HERE = Path(__file__).parent
CARD = HERE.parents[1] / "model_cards" / "docstring-classifier"
RESULT = HERE / "results" / "demo.json"
SEED = 0
# whose docstrings are the data set: another version of one of them is another data set
READ = ("numpy", "scipy", "pandas", "scikit-learn", "torch", "transformers", "matplotlib")


def main() -> None:
    """Writes `results/demo.json` and the card of the model that the demo makes."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / CARD.name
        run_demo(folder, seed=SEED)
        CARD.mkdir(parents=True, exist_ok=True)
        for name in ("README.md", "reliability.png"):
            shutil.copy(folder / name, CARD / name)
        record = json.loads((folder / "calibrator.json").read_text())
    kept = {key: record[key] for key in ("type", "num_labels", "fit")}
    write_result(RESULT, {"command": f"hf-calib demo --seed {SEED}", **kept}, "hf_calib", *READ)


if __name__ == "__main__":
    main()
