"""Writes the README's tables from the committed result files, so that no number in it is typed by hand.

A table lies between `<!-- table: NAME -->` and `<!-- end -->`.

    python examples/benchmarks/readme.py            # rewrites the tables
    python examples/benchmarks/readme.py --check    # exit code 1 where a table is not what the results say
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np

from hf_calib import CalibrationReport


HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"


def demo_table() -> str:
    """Before and after on the demo's test rows."""
    record = json.loads((HERE / "results" / "demo.json").read_text())
    report = CalibrationReport.from_dict(record["fit"]["scores"])
    calibrator = f"Calibrator: {record['type']}, chosen by cross-validation."
    return f"{report.to_markdown()} {calibrator}\n\n{_made_by('demo', record)}, `{record['command']}`."


def speed_table() -> str:
    """Every job on every shape, in floors."""
    record = json.loads((HERE / "results" / "speed.json").read_text())
    shapes = record["shapes"]
    names = [name for name in next(iter(shapes.values())) if name != "floor_seconds"]
    lines = [["Time in passes over the numbers", *(f"{shape} float32" for shape in shapes)]]
    lines.append([":---", *["---:"] * len(shapes)])
    lines += [[name, *(f"{found[name]:.3g}" for found in shapes.values())] for name in names]
    lines.append(["one pass, in milliseconds", *(f"{found['floor_seconds'] * 1e3:.3g}" for found in shapes.values())])
    note = f"{_made_by('speed', record)}: medians of {record['rounds']} interleaved rounds on "
    note += f"{record['machine']['threads']} threads."
    return _table(lines) + note


def stream_table() -> str:
    """Every kind of file: its evaluation beside its reading, and the memory."""
    record = json.loads((HERE / "results" / "stream.json").read_text())
    lines = [[f"{record['rows'] / 1e6:.0f} million rows", "MB", "Read twice, s", "`evaluate`, s", "Peak memory, MB"]]
    lines.append([":---", "---:", "---:", "---:", "---:"])
    for kind, found in record["files"].items():
        seconds = (f"{found[name]:.3g}" for name in ("reading_twice_seconds", "evaluate_seconds"))
        lines.append([kind, f"{found['megabytes']:.0f}", *seconds, f"{found['peak_megabytes']:.0f}"])
    return _table(lines) + f"{_made_by('stream', record)}: the best of {record['rounds']} rounds."


def calibrators_table() -> str:
    """Every method's scores minus those of doing nothing, on the sets on which it was measured, best first."""
    record = json.loads((HERE / "results" / "calibrators.json").read_text())
    scores = ("nll_minus_nothing", "nll_minus_selected", "brier_minus_nothing", "ece_minus_nothing")
    head = ["Method", "Sets", "NLL", "worse on", "NLL beside `select_calibrator`", "Brier", "ECE"]
    lines = [head, [":---", *["---:"] * (len(head) - 1)]]
    for name, found in record["methods"].items():
        nll, selected, brier, ece = (f"{found[score]:+.4f}" for score in scores)
        sets = str(found["sets"]) + (f", {found['failed_splits']} splits failed" if found["failed_splits"] else "")
        lines.append([name, sets, nll, str(found["worse_than_nothing"]), selected, brier, ece])
    selection = record["selection"]
    note = f"Differences from doing nothing, lower is better: means over {record['splits']} splits of each set, then "
    note += f"over {len(record['sets'])} sets, or those on which a method could be measured. `select_calibrator` is "
    note += "worse than doing nothing, beyond the paired bootstrap's 95 % bound, on "
    note += f"{selection['worse_beyond_the_95_percent_bound']} of {selection['splits']} splits. A probability below "
    note += f"{record['floor']:g} counts as that. "
    return _table(lines) + note + f"{_made_by('calibrators', record)}."


def transformer_table() -> str:
    """Speed and memory of every encoder-decoder, beside the best of the peers."""
    record = json.loads((HERE / "results" / "transformer.json").read_text())
    lengths = list(next(iter(record["models"].values()))["generated_tokens_per_second"])
    head = ["Model", "Parameters", "Training, tokens/s", "of the peak", "Memory, MB", "with checkpointing"]
    lines = [[*head, *(f"{length} new tokens, tokens/s" for length in lengths)]]
    lines.append([":---", *["---:"] * (len(lines[0]) - 1)])
    for name, found in record["models"].items():
        memory = (f"{found[key]:.0f}" for key in ("training_megabytes", "training_megabytes_with_checkpointing"))
        speed = (f"{found['generated_tokens_per_second'][length]:.0f}" for length in lengths)
        training = [f"{found['training_tokens_per_second']:.0f}", f"{found['share_of_peak']:.0%}"]
        lines.append([name, f"{found['parameters'] / 1e6:.2f} M", *training, *memory, *speed])
    note = f"{_made_by('transformer', record)}: {record['what']}. Medians of interleaved rounds on "
    return _table(lines) + note + f"{record['machine']['threads']} threads; memory beyond that of the imports."


def losses_table() -> str:
    """Time and memory of every loss, and of a step with it."""
    record = json.loads((HERE / "results" / "losses.json").read_text())
    stock = "stock cross-entropy"
    head = ["Loss", "Time", "Peak memory beyond the logits, MB", "Training step"]
    lines = [head, [":---", *["---:"] * (len(head) - 1)]]
    lines.append([stock, "1", f"{record['memory_megabytes'][stock]:.0f}", "1"])
    for name in (name for name in record["losses"] if not name.startswith(stock)):
        step = f"{record['steps'][name]:.3f}" if name in record["steps"] else ""
        memory = f"{record['memory_megabytes'][name]:.0f}"
        lines.append([f"`{name}`", f"{record['losses'][name]:.2f}", memory, step])
    loss, step = (record[kind][f"{stock}, seconds"] for kind in ("losses", "steps"))
    note = f"Beside the stock loss ({loss:.2g} s), forward and backward, on {record['what']}; and beside the stock "
    note += (
        f"Trainer's step ({step:.2g} s) with {record['step']}. Medians of {record['rounds']} interleaved rounds on "
    )
    return _table(lines) + note + f"{record['machine']['threads']} threads. {_made_by('losses', record)}."


def training_table(name: str = "training") -> str:
    """Every loss: scores of the test rows before and after a temperature; then what choosing by refinement changes."""
    record = json.loads((HERE / "results" / f"{name}.json").read_text())
    losses = list(dict.fromkeys(run.split()[1] for run in record["runs"]))
    head = ["Loss", "Accuracy", "NLL", "ECE", "NLL after", "ECE after", "NLL after, beside `cross_entropy`"]
    lines = [head, [":---", *["---:"] * (len(head) - 1)]]
    changes = {}
    for loss in losses:
        columns = [("before", "accuracy"), ("before", "nll"), ("before", "ece"), ("after", "nll"), ("after", "ece")]
        cells = [_spread(_by_seed(record, loss, "loss", *column)) for column in columns]
        changes[loss] = _by_seed(record, loss, "loss", "after", "nll") - _by_seed(
            record, "cross_entropy", "loss", "after", "nll"
        )
        lines.append([f"`{loss}`", *cells, _spread(changes[loss], signed=True)])
    sets = ", ".join(record["sets"])
    note = f"Means over {sets}, and over {record['seeds']} seeds, with the standard deviation over the seeds; the "
    note += f"temperature is fitted on other rows. {record['what']}. {_verdicts(changes)}\n\n"
    nll, accuracy = (
        np.mean([_by_seed(record, loss, "refinement", "after", score) for loss in losses], axis=0)
        - np.mean([_by_seed(record, loss, "loss", "after", score) for loss in losses], axis=0)
        for score in ("nll", "accuracy")
    )
    note += "Choosing the epoch by refinement in place of the validation loss changes the NLL after the temperature "
    note += f"by {_spread(nll, signed=True)} and the accuracy by {_spread(accuracy, signed=True)}, over all losses."
    return _table(lines) + f"{note}\n\n{_made_by('training', record)}."


def _by_seed(record: dict, loss: str, way: str, when: str, score: str) -> np.ndarray:
    """A score of each seed: the mean over the sets."""
    return np.array(
        [
            np.mean([record["runs"][f"{name} {loss} {seed}"][way][when][score] for name in record["sets"]])
            for seed in range(record["seeds"])
        ]
    )


def _spread(values: np.ndarray, *, signed: bool = False) -> str:
    return f"{values.mean():{'+' if signed else ''}.4f} ± {values.std(ddof=1):.4f}"


def _verdicts(changes: dict[str, np.ndarray]) -> str:
    """Which losses are better and worse than cross-entropy after a temperature, by two standard errors."""
    found = {"lower": [], "higher": [], "not to be told apart": []}
    for loss, values in changes.items():
        error = 2 * values.std(ddof=1) / len(values) ** 0.5
        if loss != "cross_entropy":
            key = "lower" if values.mean() < -error else "higher" if values.mean() > error else "not to be told apart"
            found[key].append(f"`{loss}`")
    parts = [f"{what} with {', '.join(names)}" for what, names in found.items() if names]
    start = "Beside cross-entropy, and to two standard errors over the seeds, the NLL after the temperature is "
    return f"{start}{'; '.join(parts)}."


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _made_by(name: str, record: dict) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    return f"Made by [{name}.py](examples/benchmarks/{name}.py) with {versions}"


TABLES = {
    "calibrators": calibrators_table,
    "demo": demo_table,
    "losses": losses_table,
    "speed": speed_table,
    "stream": stream_table,
    "training": training_table,
    "training_encoder": partial(training_table, "training_encoder"),
    "transformer": transformer_table,
}


def render(text: str) -> str:
    """The README with every `<!-- table: NAME -->` ... `<!-- end -->` filled from the results."""

    def fill(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrites the README, or checks it."""
    text = README.read_text(encoding="utf-8")
    filled = render(text)
    if "--check" in sys.argv:
        sys.exit(text != filled)
    README.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
