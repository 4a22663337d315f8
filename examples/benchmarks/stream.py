"""`hf-calib evaluate` on a Parquet file of ten million rows: its time beside that of reading the file, and its memory.

Each kind of file is written in row groups into a temporary folder, read with pyarrow alone and evaluated, in rounds,
each time in a process of its own. The best times and the largest peak go to `results/stream.json`.

    python examples/benchmarks/stream.py            # some five minutes and 1 GB of disk
    python examples/benchmarks/stream.py --rounds 1 --rows 1000000
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from environment import write_result
from pyarrow import parquet


NUM_LABELS = 10
GROUP_ROWS = 500_000
RESULT = Path(__file__).parent / "results" / "stream.json"

# What a process is asked to do with the file that its argument names. It says on its last line how many seconds that
# took, without its start, and the largest memory it has had in all.
REPORT = """
import json, resource, sys, time
import pyarrow.parquet as parquet
{imports}
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({{"seconds": seconds, "peak": peak}}))
"""
READ = """
file = parquet.ParquetFile(sys.argv[1])
for group in range(file.num_row_groups):
    file.read_row_group(group)
"""
IMPORTS = "from hf_calib import console, measuring\nfrom hf_calib.cli import app"
EVALUATE = "app(['evaluate', sys.argv[1]], standalone_mode=False)"


def event_groups(num_rows: int) -> Iterator[pa.Table]:
    """Confidence that is right, and whether the answer was."""
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, GROUP_ROWS):
        size = min(GROUP_ROWS, num_rows - start)
        confidence = rng.uniform(size=size).astype(np.float32)
        yield pa.table({"probs": confidence, "label": (rng.uniform(size=size) < confidence).astype(np.int64)})


def class_groups(num_rows: int, dtype: type, as_lists: bool = True) -> Iterator[pa.Table]:
    """Class probabilities that are right, as a list per row or a column per class, and labels drawn from them."""
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, GROUP_ROWS):
        size = min(GROUP_ROWS, num_rows - start)
        logits = 2 * rng.standard_normal((size, NUM_LABELS), dtype=np.float32)
        label = (logits + rng.gumbel(size=logits.shape)).argmax(1)
        probs = np.exp(logits)
        probs = (probs / probs.sum(1, keepdims=True)).astype(dtype)
        if as_lists:
            ends = np.arange(0, probs.size + 1, NUM_LABELS, dtype=np.int32)
            yield pa.table({"probs": pa.ListArray.from_arrays(ends, probs.reshape(-1)), "label": label})
        else:
            yield pa.table({**{f"probs_{k}": probs[:, k].copy() for k in range(NUM_LABELS)}, "label": label})


def write(path: Path, groups: Iterator[pa.Table]) -> None:
    """One row group for each table."""
    first = next(groups)
    with parquet.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in groups:
            writer.write_table(table)


def run(path: Path, work: str, imports: str = "") -> dict[str, float]:
    """The work in a new process: its seconds, those of the whole process, and the peak in bytes."""
    started = time.perf_counter()
    code = REPORT.format(imports=imports, work=work)
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return {**json.loads(result.stdout.splitlines()[-1]), "whole": time.perf_counter() - started}


def measure(path: Path, rounds: int) -> dict[str, float]:
    """The best of each over the rounds; of the peak, the largest."""
    pairs = [(run(path, READ), run(path, EVALUATE, IMPORTS)) for _ in range(rounds)]
    read = 2 * min(reading["seconds"] for reading, _ in pairs)
    seconds = min(evaluation["seconds"] for _, evaluation in pairs)
    return {
        "megabytes": path.stat().st_size / 1e6,
        "reading_twice_seconds": read,
        "evaluate_seconds": seconds,
        "evaluate_over_reading_twice": seconds / read,
        "command_seconds": min(evaluation["whole"] for _, evaluation in pairs),
        "peak_megabytes": max(evaluation["peak"] for _, evaluation in pairs) / 1e6,
    }


def main() -> None:
    """Measures every kind of file and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    classes = f"{NUM_LABELS} classes, a"
    kinds = {
        "confidence and correctness, float32": event_groups(options.rows),
        f"{classes} column each, float32": class_groups(options.rows, np.float32, as_lists=False),
        f"{classes} list per row, float32": class_groups(options.rows, np.float32),
        f"{classes} list per row, float64": class_groups(options.rows, np.float64),
    }
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.parquet"
        for kind, groups in kinds.items():
            write(path, groups)
            files[kind] = found = measure(path, options.rounds)
            print(kind, {name: float(f"{value:.3g}") for name, value in found.items()}, flush=True)
    record = {
        "what": "hf-calib evaluate of a Parquet file, the five metrics with intervals: seconds without the "
        "start of the process, and of the whole command; reading is pyarrow's, all row groups, from the page cache",
        "rows": options.rows,
        "rounds": options.rounds,
        "files": files,
    }
    write_result(options.output, record, "hf_calib", "torch", "transformers", "pyarrow", "numpy")


if __name__ == "__main__":
    main()
