import json
import os
import subprocess
import sys
import tempfile

import pytest


# Before anything reads them at import: the tests reach no network and leave the user's caches alone.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HOME": tempfile.mkdtemp(prefix="hf-home-")}

import torch

from .loopback_hub import LoopbackHub
from .tiny import SPECIAL, make_classifier, make_tokenizer


WORDS = [f"w{index}" for index in range(40)]


@pytest.fixture(scope="session")
def loopback_hub():
    """A Hub on 127.0.0.1 for clients in processes of their own. Tests share it: each has repo names of its own."""
    with LoopbackHub() as hub:
        yield hub
    assert hub.outside == [], "a client of the loopback hub tried to reach another host"


@pytest.fixture
def in_new_process(tmp_path):
    """Runs Python code in a process of its own, offline, in `tmp_path`. It reads JSON and prints JSON."""

    def run(code, argument):
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        options = {"input": json.dumps(argument), "cwd": tmp_path, "env": env, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", code], **options, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def classifier():
    """A classifier whose labels are sad, calm and glad."""
    return make_classifier(["sad", "calm", "glad"], len(SPECIAL) + len(WORDS))


@pytest.fixture(scope="session")
def tokenizer():
    """The classifier's: it knows `WORDS`."""
    return make_tokenizer(WORDS)


@pytest.fixture(scope="session")
def labelled_texts():
    """Thirty texts of one to ten words; the names of their labels come in another order than the classifier's."""
    from datasets import ClassLabel, Dataset, Features, Value

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 11, (30,), generator=generator).tolist()
    words = [torch.randint(len(WORDS), (n,), generator=generator).tolist() for n in lengths]
    texts = [" ".join(WORDS[word] for word in row) for row in words]
    labels = torch.randint(3, (30,), generator=generator).tolist()
    features = {"text": Value("string"), "label": ClassLabel(names=["glad", "sad", "calm"])}
    return Dataset.from_dict({"text": texts, "label": labels}, features=Features(features))


@pytest.fixture
def temperature():
    """A calibrator for three labels, fitted where the right temperature is 2.5."""
    from hf_calib import TemperatureScaling

    p = torch.tensor([0.8, 0.15, 0.05])
    labels = torch.tensor([0] * 16 + [1] * 3 + [2])
    return TemperatureScaling().fit((2.5 * p.log()).expand(20, 3), labels)


@pytest.fixture
def tokens():
    """Four rows of six tokens, as keyword arguments of a model."""
    ids = torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), (4, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
