"""Two processes say what one says: also with an uneven last batch, and where one has seen nothing."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from hf_calib.distributed import sum_over_processes, union_over_processes
from hf_calib.metrics import GroupedMetric, MetricCollection

from .every import class_rows


NAMES = ["ece", "nll", "classwise_ece", "aurc", "smooth_ece"]
PROCESS = """
    import json, sys
    import torch
    import torch.distributed as dist
    from hf_calib.metrics import GroupedMetric, MetricCollection

    rank, store, rows = int(sys.argv[1]), sys.argv[2], torch.load(sys.argv[3], weights_only=True)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for case, sizes in {"even": (4, 4), "uneven": (5, 2), "none": (7, 0)}.items():
        start, size = sum(sizes[:rank]) * 50, sizes[rank] * 50
        metrics, groups = MetricCollection(NAMES), GroupedMetric("ece")
        for first in range(start, start + size, 64):
            part = slice(first, min(first + 64, start + size))
            metrics.update(rows["probs"][part], rows["labels"][part])
            groups.update(rows["probs"][part], rows["labels"][part], rows["groups"][part])
        total, by_group = metrics.all_reduce(), groups.all_reduce().compute()
        assert metrics.num_rows == size, "the process's own sums stay"
        found[case] = {
            "rows": total.num_rows, **{name: float(value) for name, value in total.compute().items()},
            "groups": {name: float(value) for name, value in by_group.values.items()},
        }
    other = MetricCollection(["classwise_ece"])
    other.update(torch.full((1, 2 + rank), 1 / (2 + rank)), torch.tensor([0]))
    try:
        other.all_reduce()
    except ValueError as error:
        found["error"] = str(error)
    print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()  # whoever leaves early may abort the other
"""


def run_together(commands):
    """What each of several processes prints."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), outputs
    return [output for output, _ in outputs]


def test_without_processes_there_is_nothing_to_add():
    assert sum_over_processes(3, None) == (3, None)
    assert union_over_processes(["b", "a"]) == ["a", "b"]
    metrics = MetricCollection(NAMES)
    metrics.update(*class_rows())
    assert metrics.all_reduce().compute() == metrics.compute()


def test_two_processes_are_one(tmp_path):
    probs, labels = class_rows()
    groups = torch.arange(400) // 150  # the second process has groups that the first has not
    torch.save({"probs": probs, "labels": labels, "groups": groups}, tmp_path / "rows.pt")
    code = textwrap.dedent(PROCESS).replace("NAMES", repr(NAMES))
    command = [sys.executable, "-c", code]
    outputs = run_together([[*command, str(rank), tmp_path / "store", tmp_path / "rows.pt"] for rank in range(2)])
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second
    for case, num_rows in {"even": 400, "uneven": 350, "none": 350}.items():
        expected, by_group = MetricCollection(NAMES), GroupedMetric("ece")
        expected.update(probs[:num_rows], labels[:num_rows])
        by_group.update(probs[:num_rows], labels[:num_rows], groups[:num_rows])
        found = first[case]
        assert found.pop("rows") == num_rows
        assert found.pop("groups") == {
            name: pytest.approx(value.item(), abs=1e-9) for name, value in by_group.compute().values.items()
        }
        assert found == {name: pytest.approx(value.item(), abs=1e-9) for name, value in expected.compute().items()}
    assert first["error"].startswith("probs: the processes have different classes: between 90 and 135")
