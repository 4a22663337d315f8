"""transformers' own tests of models, from its source distribution: `make test` unpacks it into the environment.

The distribution lacks three modules that its tests import; stand-ins are made here. It has no tests of generation, of
exporting and of single pipelines, so those mixins are empty.
"""

import sys
import types
from pathlib import Path

import transformers


FOLDER = Path(sys.prefix) / "transformers-tests" / f"transformers-{transformers.__version__}" / "tests"
NAME = "transformers_tests"


def add_module(name, path=None, **contents):
    module = types.ModuleType(f"{NAME}.{name}" if name else NAME)
    module.__dict__.update(contents)
    if path is not None:
        module.__path__ = path
    sys.modules[module.__name__] = module


def install():
    """Make the unpacked folder importable as `transformers_tests`."""
    common_values = {"return_dict": False, "output_hidden_states": True, "problem_type": "regression"}
    add_module("", path=[str(FOLDER)])
    for package in ("exporters", "generation", "utils"):
        add_module(package, path=[])
    add_module("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    add_module("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    add_module("utils.test_configuration_utils", config_common_kwargs=common_values)
