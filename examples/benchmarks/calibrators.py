"""What every calibrator does to NLL, Brier score and ECE on many models' logits, beside other packages' methods.

Every calibrator of `hf_calib.CALIBRATORS`, `select_calibrator`, scikit-learn's, netcal's and probmetrics' methods and
doing nothing, each on five splits of every problem of `problems.py`. A method is fitted on the calibration rows and
scored on the test rows; one that fails or takes longer than the limit is recorded as that.

    python examples/benchmarks/text_logits.py --data FOLDER     # once: the logits of the text sets
    python examples/benchmarks/calibrators.py --data FOLDER     # about half an hour on two cores

What is measured is kept in the cache folder, so an interrupted run goes on where it was. It is measured again when
the numbers of a set, the code of the calibrators or another package's version change.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import math
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import peers
import torch
from calibrator_summary import NOTHING, SELECTED, summarise
from environment import write_result
from peers import PEERS, TWO_CLASS_PEERS
from problems import FLOOR, MAX_CALIBRATION_ROWS, NUM_SPLITS, Problem, all_problems
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from text_logits import CACHE

import hf_calib
from hf_calib.functional import brier_score, expected_calibration_error
from hf_calib.functional.resampling import bootstrap_interval, mean_statistic, resample_counts


RESULT = Path(__file__).parent / "results" / "calibrators.json"
NUM_BINS = 15
NUM_RESAMPLES = 1000
TIME_LIMIT_SECONDS = 30.0
PACKAGES = ("hf_calib", "torch", "scikit-learn", "netcal", "probmetrics", "numpy")

UNCHANGING = ("identity", "prior_correction")  # without logits of another distribution the latter changes nothing

# (calibration logits, their labels, test logits) -> log-probabilities of the test rows, and what there is to tell
Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict]]


def own_method(name: str) -> Method:
    """A calibrator of this library, on float32 logits."""

    def run(logits: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return hf_calib.CALIBRATORS[name]().fit(logits, labels).log_probs(test), {}

    return run


def selected_method(logits: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """`select_calibrator` with its defaults."""
    calibrator = hf_calib.select_calibrator(logits, labels)
    return calibrator.log_probs(test), {"chosen": calibrator.name}


def peer_method(name: str) -> Method:
    """Another package's method, on float64 arrays; its rows are normalised."""

    def run(logits: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, dict]:
        probs = torch.from_numpy(PEERS[name](logits.double().numpy(), labels.numpy(), test.double().numpy()))
        if broken := int((~probs.isfinite() | (probs < 0)).any(1).sum()):
            raise ValueError(f"{broken} of {len(probs)} rows are not probabilities")
        return (probs / probs.sum(1, keepdim=True)).log(), {}

    return run


def methods_for(problem: Problem) -> dict[str, Method]:
    """Whatever can be fitted on so many classes; doing nothing first."""
    two = problem.logits.shape[1] == 2
    own = [name for name in hf_calib.CALIBRATORS if name not in UNCHANGING]
    return {
        NOTHING: own_method("identity"),
        **{f"hf_calib {name}": own_method(name) for name in own if two or not two_classes_only(name)},
        SELECTED: selected_method,
        **{name: peer_method(name) for name in PEERS if two or name not in TWO_CLASS_PEERS},
    }


def two_classes_only(name: str) -> bool:
    """Whether this calibrator refuses three classes."""
    return hf_calib.CALIBRATORS[name].two_classes_only


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A TimeoutError after so many seconds, where the system has alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def score_rows(log_probs: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """The scores, and each row's NLL: a probability below the floor counts as the floor."""
    found = log_probs.double().gather(1, labels[:, None])[:, 0]
    surprise = 0 - found.clamp_min(math.log(FLOOR))
    probs = log_probs.double().exp()
    scores = {
        "nll": float(surprise.mean()),
        "brier": float(brier_score(probs, labels)),
        "ece": float(expected_calibration_error(probs, labels, num_bins=NUM_BINS)),
        "floored_rows": int((found < math.log(FLOOR / 2)).sum()),  # not those that were read as the floor itself
    }
    return scores, surprise


def paired_interval(difference: torch.Tensor) -> dict[str, float]:
    """The mean difference and its 95 % bootstrap interval."""
    statistic = mean_statistic(difference)
    replicates = torch.cat([statistic(block) for block in resample_counts(len(difference), NUM_RESAMPLES)])
    mean = float(difference.mean())
    low, high = bootstrap_interval(mean, replicates)
    return {"difference": mean, "low": low, "high": high}


def measure(method: Method, problem: Problem, split: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """One method on one split: its scores and the seconds it took, or why there are none."""
    fit_rows, test_rows = split
    logits, labels, test = problem.logits[fit_rows], problem.labels[fit_rows], problem.logits[test_rows]
    torch.manual_seed(0)
    np.random.seed(0)  # other packages may draw from it
    started = time.perf_counter()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            time_limit(TIME_LIMIT_SECONDS),
        ):
            warnings.simplefilter("ignore")
            log_probs, told = method(logits, labels, test)
        seconds = time.perf_counter() - started
        scores, surprise = score_rows(log_probs, problem.labels[test_rows])
    except Exception as error:  # whatever another package raises is its result
        return {"failure": "".join(traceback.format_exception_only(error)).strip()[:300]}
    if "chosen" in told:
        _, nothing = score_rows(test.double().log_softmax(-1), problem.labels[test_rows])
        told |= paired_interval(surprise - nothing)
    return {**scores, "seconds": seconds, **told}


class Kept:
    """What has been measured on a problem, one JSON line for each split and method."""

    def __init__(self, folder: Path, problem: Problem):
        self.path = folder / f"{problem.name}.jsonl"
        self.data = digest(problem.logits.numpy().tobytes(), problem.labels.numpy().tobytes())
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = {self.key(line): line for line in map(json.loads, lines)}

    @staticmethod
    def key(line: dict) -> tuple:
        """What a line is about."""
        return tuple(line[name] for name in ("data", "split", "method", "code"))

    def get(self, split: int, method: str) -> dict | None:
        """The line, if it was measured on these numbers by this code."""
        return self.lines.get((self.data, split, method, code_of(method)))

    def add(self, split: int, method: str, found: dict) -> dict:
        """Keeps a line, on disk at once."""
        line = {"data": self.data, "split": split, "method": method, "code": code_of(method), **found}
        self.lines[self.key(line)] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def digest(*contents: bytes) -> str:
    """A short name of some content."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def code_of(method: str) -> str:
    """What a result depends on beside the data: the calibrators' source, or a package's version and its call."""
    if method in PEERS:
        return f"{version(method.split()[0])} {PEER_CODE}"
    return SELECTION_CODE if method == SELECTED else OWN_CODE


PEER_CODE = digest(Path(inspect.getfile(peers)).read_bytes())
OWN_FOLDER = Path(inspect.getfile(hf_calib.Calibrator)).parent
OWN_FILES = {path.name: path.read_bytes() for path in sorted(OWN_FOLDER.glob("*.py"))}
SELECTION_CODE = digest(*OWN_FILES.values())
OWN_CODE = digest(*(content for name, content in OWN_FILES.items() if name != "selection.py"))


def measure_all(problem: Problem, kept: Kept, advance: Callable[[str], None]) -> list[dict]:
    """Every method on every split; one that was too slow once is not tried again on this problem."""
    lines = []
    slow: dict[str, dict] = {}
    for split, rows in enumerate(problem.splits()):
        for name, method in methods_for(problem).items():
            advance(name)
            line = kept.get(split, name)
            if line is None:
                found = slow.get(name) or measure(method, problem, rows)
                line = kept.add(split, name, found)
            if line.get("failure", "").startswith("TimeoutError"):
                slow[name] = {"failure": line["failure"]}
            lines.append(line)
    return lines


def main() -> None:
    """Measures what is missing, and writes and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--only", nargs="*", help="names of problems; by default all")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(2)
    folder = options.cache / "results"
    folder.mkdir(parents=True, exist_ok=True)
    problems = list(all_problems(options.data, options.cache))
    if options.only:
        problems = [problem for problem in problems if problem.name in options.only]
    sets = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=NUM_SPLITS * sum(len(methods_for(problem)) for problem in problems))
        for problem in problems:

            def advance(method: str, name: str = problem.name) -> None:
                progress.update(task, advance=1, description=f"{name}: {method}")

            sets[problem.name] = problem, measure_all(problem, Kept(folder, problem), advance)
    record = {
        "what": "scores on test rows, means over splits; what is not measured says why",
        "floor": FLOOR,
        "num_bins": NUM_BINS,
        "splits": NUM_SPLITS,
        "max_calibration_rows": MAX_CALIBRATION_ROWS,
        "time_limit_seconds": TIME_LIMIT_SECONDS,
        **summarise(sets),
    }
    write_result(options.output, record, *PACKAGES)
    show(record)


def show(record: dict) -> None:
    """The table of methods, best first."""
    columns = {
        "Sets": "sets",
        "NLL - nothing": "nll_minus_nothing",
        "worse": "worse_than_nothing",
        "NLL - selected": "nll_minus_selected",
        "Brier - nothing": "brier_minus_nothing",
        "ECE - nothing": "ece_minus_nothing",
        "Seconds": "seconds",
        "Failed splits": "failed_splits",
    }
    table = Table("Method", *columns)
    for name, row in record["methods"].items():
        cells = (row[key] for key in columns.values())
        table.add_row(name, *(str(cell) if isinstance(cell, int) else f"{cell:.4f}" for cell in cells))
    console = Console(width=140)
    console.print(table)
    console.print(record["selection"])


if __name__ == "__main__":
    main()
