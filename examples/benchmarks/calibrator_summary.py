"""Sums the calibrators' benchmark up: means over splits for each set, then over sets for each method."""

from collections import Counter
from collections.abc import Iterable
from statistics import fmean

from peers import PEERS
from problems import Problem


NOTHING = "doing nothing"
SELECTED = "hf_calib select_calibrator"
SCORES = ("nll", "brier", "ece", "seconds", "floored_rows")


def summarise(sets: dict[str, tuple[Problem, list[dict]]]) -> dict:
    """Everything that the result file says of the measurements."""
    by_set = {name: _by_split(lines) for name, (_, lines) in sets.items()}
    names = list(dict.fromkeys(method for splits in by_set.values() for method in splits))
    sources = {name: problem.source for name, (problem, _) in sets.items()}
    methods = {name: found for name in names if (found := _over_sets(name, by_set, sources))}
    best_first = sorted(methods, key=lambda name: methods[name]["nll_minus_selected"] or 0.0)
    return {
        "sets": {name: _of_set(problem, by_set[name]) for name, (problem, _) in sets.items()},
        "methods": {name: methods[name] for name in best_first},
        "selection": _selection(by_set),
    }


def _by_split(lines: list[dict]) -> dict[str, dict[int, dict]]:
    methods: dict[str, dict[int, dict]] = {}
    for line in lines:
        methods.setdefault(line["method"], {})[line["split"]] = line
    return methods


def _of_set(problem: Problem, splits: dict[str, dict[int, dict]]) -> dict:
    fit_rows, test_rows = problem.splits()[0]
    return {
        "source": problem.source,
        "num_labels": problem.logits.shape[1],
        "calibration_rows": len(fit_rows),
        "test_rows": len(test_rows),
        "own_split": bool(problem.num_calibration),
        "methods": {name: _means(list(lines.values())) for name, lines in splits.items()},
        "selected": [
            {key: line[key] for key in ("split", "chosen", "difference", "low", "high")}
            for line in splits[SELECTED].values()
            if "failure" not in line
        ],
    }


def _means(lines: list[dict]) -> dict:
    measured = [line for line in lines if "failure" not in line]
    found = {name: fmean(line[name] for line in measured) for name in SCORES} if measured else {}
    failures = [line["failure"] for line in lines if "failure" in line]
    return {**found, "splits": len(measured), **({"failure": failures[0]} if failures else {})}


def _difference(splits: dict[str, dict[int, dict]], method: str, other: str, score: str = "nll") -> float | None:
    """Mean over the splits on which both were measured."""
    pairs = [(line, splits[other].get(split, {})) for split, line in splits.get(method, {}).items()]
    both = [first[score] - second[score] for first, second in pairs if score in first and score in second]
    return fmean(both) if both else None


def _over_sets(method: str, by_set: dict[str, dict[str, dict[int, dict]]], sources: dict[str, str]) -> dict | None:
    """Means over the sets on which it was measured, set by set; `*_by_source` are means over the sources' means."""
    tried = {name: splits for name, splits in by_set.items() if method in splits}
    measured = {name: splits for name, splits in tried.items() if _difference(splits, method, NOTHING) is not None}
    if not measured:
        return None
    nothing = {name: _difference(splits, method, NOTHING) for name, splits in measured.items()}
    selected = {name: _difference(splits, method, SELECTED) for name, splits in measured.items()}
    means = [_means(list(splits[method].values())) for splits in measured.values()]
    return {
        "sets": len(measured),
        "failed_sets": len(tried) - len(measured),
        "failed_splits": sum("failure" in line for splits in tried.values() for line in splits[method].values()),
        "worse_than_nothing": sum(value > 0 for value in nothing.values()),
        "nll_minus_nothing": fmean(nothing.values()),
        "nll_minus_nothing_by_source": _mean_of_sources(nothing, sources),
        "nll_minus_selected": _mean(selected.values()),
        "nll_minus_selected_by_source": _mean_of_sources(selected, sources),
        **{
            f"{score}_minus_nothing": fmean(
                _difference(splits, method, NOTHING, score) for splits in measured.values()
            )
            for score in ("brier", "ece")
        },
        **{score: fmean(mean[score] for mean in means) for score in SCORES},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _mean_of_sources(values: dict[str, float | None], sources: dict[str, str]) -> float | None:
    groups: dict[str, list[float | None]] = {}
    for name, value in values.items():
        groups.setdefault(sources[name], []).append(value)
    return _mean(_mean(group) for group in groups.values())


def _selection(by_set: dict[str, dict[str, dict[int, dict]]]) -> dict:
    """What `select_calibrator` is held to: how often it is worse than doing nothing, and the best peer of each set."""
    lines = [line for splits in by_set.values() for line in splits[SELECTED].values() if "failure" not in line]
    gaps = [[_difference(splits, SELECTED, peer) for peer in PEERS if peer in splits] for splits in by_set.values()]
    known = [[gap for gap in of_set if gap is not None] for of_set in gaps]
    return {
        "splits": len(lines),
        "worse_than_nothing": sum(line["difference"] > 0 for line in lines),
        "worse_beyond_the_95_percent_bound": sum(line["low"] > 0 for line in lines),
        "nll_minus_best_peer_of_each_set": _mean(max(of_set) for of_set in known if of_set),
        "chosen": dict(Counter(line["chosen"] for line in lines).most_common()),
    }
