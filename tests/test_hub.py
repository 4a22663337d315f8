"""A calibrated model as a folder and as a repo: whole or not at all, and applied exactly once."""

import json
import os
import signal
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_calib import (
    CalibTransformerConfig,
    CalibTransformerForCausalLM,
    IsotonicCalibration,
    TemperatureScaling,
    attach_calibrator,
    attached_calibrator,
    detach_calibrator,
    fold_calibrator,
    load_calibrated,
    save_calibrated,
    unfold_calibrator,
)
from hf_calib.attaching import folded_calibrator
from hf_calib.folding import remove_calibrator

from .forged import forge


APPLY = {"attached": attach_calibrator, "folded": fold_calibrator}
FILES = {"README.md", "calibrator.json", "calibrator.safetensors", "config.json", "model.safetensors"}


@pytest.fixture(params=APPLY)
def applied(request):
    return request.param


@pytest.fixture
def calibrated(applied, classifier, temperature):
    return APPLY[applied](classifier, temperature)


@pytest.fixture
def saved(calibrated, tmp_path):
    return save_calibrated(calibrated, tmp_path / "saved")


@torch.no_grad()
def probs_of(model, tokens):
    return model(**tokens).logits.softmax(-1)


def plain_load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- one folder


def test_a_folder_holds_everything_and_loads_equal(calibrated, applied, tokenizer, tokens, tmp_path):
    path = tmp_path / "new" / "folder"
    assert save_calibrated(calibrated, str(path), processing_class=tokenizer) == path
    assert set(state(path)) == FILES | {"tokenizer.json", "tokenizer_config.json"}
    assert path.stat().st_mode & 0o777 == 0o755
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_calibrated(str(path))
    assert not loaded.training
    assert (attached_calibrator(loaded) is None, folded_calibrator(loaded) is None) == (
        applied == "folded",
        applied == "attached",
    )
    assert torch.equal(probs_of(loaded, tokens), probs_of(calibrated, tokens))


def test_options_reach_from_pretrained(saved):
    assert load_calibrated(saved, dtype=torch.float64).dtype == torch.float64


def test_the_record_says_how_and_beside_which_weights(saved, applied):
    record = json.loads((saved / "calibrator.json").read_text())
    assert record["applied"] == applied
    assert record["label_names"] == ["sad", "calm", "glad"]
    assert len(record["weights"]) == 64


# -- exactly once


def load(model, folder):
    save_calibrated(model, folder)
    return load_calibrated(folder)


def load_by_plain_save(model, folder):
    model.save_pretrained(folder)
    return load_calibrated(folder)


def load_plain(model, folder):
    model.save_pretrained(folder)
    return plain_load(folder)


def reattach(model, folder):
    calibrator = attached_calibrator(model)
    return attach_calibrator(detach_calibrator(model), calibrator)


def refold(model, folder):
    calibrator = folded_calibrator(model)
    return fold_calibrator(unfold_calibrator(model), calibrator)


def attach_for_fold(model, folder):
    calibrator = folded_calibrator(model)
    return attach_calibrator(unfold_calibrator(model), calibrator)


@pytest.mark.parametrize(
    ("first", "steps"),
    [
        ("attached", [load, load, load]),
        ("attached", [load_by_plain_save, load, load_by_plain_save]),
        ("attached", [load, reattach, load]),
        ("folded", [load, load, load]),
        ("folded", [load_by_plain_save, load, load_plain]),
        ("folded", [load, load_plain, load_plain]),
        ("folded", [load, refold, load]),
        ("folded", [load, attach_for_fold, load, load]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(step.__name__ for step in value),
)
def test_no_history_changes_a_score(first, steps, classifier, temperature, tokens, tmp_path):
    with torch.no_grad():
        wanted = temperature(classifier(**tokens).logits).softmax(-1)
    model = APPLY[first](classifier, temperature)
    for number, step in enumerate(steps):
        model = step(model, tmp_path / str(number))
        torch.testing.assert_close(probs_of(model, tokens), wanted, rtol=0, atol=1e-6)


def test_a_removed_calibrator_stays_away(saved, applied, tokens, temperature, tmp_path):
    model = load_calibrated(saved)
    model = detach_calibrator(model) if applied == "attached" else unfold_calibrator(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match=r"holds no calibrator\.json"):
        load_calibrated(tmp_path / "plain")
    raw = plain_load(tmp_path / "plain")
    assert torch.equal(probs_of(raw, tokens), probs_of(model, tokens))
    APPLY[applied](raw, temperature)
    torch.testing.assert_close(probs_of(raw, tokens), probs_of(load_calibrated(saved), tokens), rtol=0, atol=1e-6)


# -- all or nothing


def test_an_uncalibrated_model_is_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match="model: no calibrator is attached or folded"):
        save_calibrated(classifier, tmp_path / "new")
    assert not state(tmp_path)


def test_a_head_that_could_not_be_loaded_again_is_refused(temperature, tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    model = attach_calibrator(BertForMultipleChoice(config), temperature)
    with pytest.raises(ValueError, match="got a BertForMultipleChoice; allowed are models of AutoModelForSeque"):
        save_calibrated(model, tmp_path / "new")
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"got a BertForMultipleChoice; .*attach_calibrator\(model, AutoCalibrator"):
        load_calibrated(tmp_path / "own")


def bert_of_tokens(num_labels):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForTokenClassification(BertConfig(vocab_size=50, num_labels=num_labels, **sizes))


def vit(num_labels):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=num_labels, **sizes))


def gpt2(vocab_size):
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=16))


def bart(vocab_size):
    sizes = {"d_model": 16, "max_position_embeddings": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(vocab_size=vocab_size, **sizes))


def calib_transformer(vocab_size):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return CalibTransformerForCausalLM(CalibTransformerConfig(vocab_size=vocab_size, **sizes, **tokens))


@pytest.mark.parametrize(
    ("make_model", "num_labels", "task"),
    [
        (bert_of_tokens, 3, "token-classification"),
        (vit, 3, "image-classification"),
        (gpt2, 50, "text-generation"),
        (calib_transformer, 50, "text-generation"),
        (bart, 50, "text2text-generation"),
    ],
)
def test_other_heads(make_model, num_labels, task, tmp_path):
    torch.manual_seed(0)
    model = make_model(num_labels).eval()
    logits = 3 * torch.randn(200, num_labels)
    calibrator = TemperatureScaling().fit(logits, torch.multinomial((logits / 2).softmax(-1), 1)[:, 0])
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])} if task != "image-classification" else {}
    inputs = inputs or {"pixel_values": torch.randn(1, 3, 8, 8)}
    with torch.no_grad():
        raw = model(**inputs).logits
    save_calibrated(attach_calibrator(model, calibrator), tmp_path / "new")
    loaded = load_calibrated(tmp_path / "new")
    assert type(loaded) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, calibrator(raw))
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert card.data.pipeline_tag == task
    assert "load_calibrated" in card.text
    names = "Labels: LABEL_0, LABEL_1, LABEL_2." in card.text
    assert names == (num_labels == 3)
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_the_folder_that_one_stands_in_can_be_filled(calibrated, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert save_calibrated(calibrated, ".") == tmp_path / "here"
    assert "\n# here\n" in (tmp_path / "here" / "README.md").read_text()


def test_a_file_in_the_way_is_named(calibrated, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=r"path: .*file is a file; allowed"):
        save_calibrated(calibrated, tmp_path / "file" / "made")


def test_nothing_is_overwritten(calibrated, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(
            FileExistsError, match=r"path: .* exists already; allowed are a new folder or an empty one"
        ):
            save_calibrated(calibrated, path)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_folder_is_filled(calibrated, tmp_path):
    assert set(state(save_calibrated(calibrated, tmp_path))) == FILES


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_nothing_behind(error, existing, calibrated, tokens, tmp_path, monkeypatch):
    class Failing:
        def save_pretrained(self, folder):
            assert set(state(folder)) == FILES - {"README.md"}
            raise error

    path, before = tmp_path / "new", probs_of(calibrated, tokens)
    if existing:
        path.mkdir()
    with pytest.raises(type(error)):
        save_calibrated(calibrated, path, processing_class=Failing())
    assert list(tmp_path.rglob("*")) == ([path] if existing else [])
    assert torch.equal(probs_of(calibrated, tokens), before)
    save_calibrated(calibrated, path)


# -- replacing


def test_a_model_is_replaced_and_what_else_is_there_stays(saved, classifier, tokens, temperature):
    (saved / "notes.txt").write_text("mine")
    card = (saved / "README.md").read_text().replace("\n# saved\n", "\n# saved\n\nTrained by hand.\n")
    (saved / "README.md").write_text(card)
    (saved / "logs").mkdir()
    (saved / "logs" / "loss.txt").write_text("0.1")
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"of a model before")
    other = remove_calibrator(classifier)
    temperature.temperature.fill_(7)
    save_calibrated(attach_calibrator(other, temperature), saved, overwrite=True)
    assert set(state_of_files(saved)) == FILES | {"notes.txt", "logs/loss.txt"}
    assert (saved / "notes.txt").read_text() == "mine"
    assert "Trained by hand." in (saved / "README.md").read_text()
    assert torch.equal(probs_of(load_calibrated(saved), tokens), probs_of(other, tokens))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def state_of_files(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_what_is_no_model_is_not_replaced(calibrated, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"path: .* exists already; allowed"):
        save_calibrated(calibrated, tmp_path, overwrite=True)
    assert save_calibrated(calibrated, tmp_path / "new", overwrite=True).is_dir()


def test_a_failure_leaves_the_old_folder(saved, calibrated):
    class Failing:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    before = state(saved)
    with pytest.raises(OSError, match="disk full"):
        save_calibrated(calibrated, saved, processing_class=Failing(), overwrite=True)
    assert state(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_without_an_exchange_two_renames_do(saved, calibrated, tokens, monkeypatch):
    from hf_calib import folders

    monkeypatch.setattr(folders, "_exchanged_at_once", lambda *names: False)
    folders._exchange(saved, other := save_calibrated(calibrated, saved.parent / "other"))
    assert torch.equal(probs_of(load_calibrated(saved), tokens), probs_of(load_calibrated(other), tokens))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["other", "saved"]


SAVE_UNTIL_KILLED = """
import json, os, signal, sys, time, warnings
import torch
import hf_calib
from transformers.utils import logging

warnings.simplefilter("error")
logging.disable_progress_bar()
folder, waits = json.load(sys.stdin)
model = hf_calib.load_calibrated(folder)
calibrator = hf_calib.attached_calibrator(model)


def save_for_ever(number=0):
    while True:
        number += 1
        calibrator.temperature.fill_(1.0 + number % 2)
        with torch.no_grad():
            model.classifier.bias.fill_(float(number % 2))
        calibrator.provenance.clear()
        hf_calib.save_calibrated(model, folder, overwrite=True)


found = []
for wait in waits:
    child = os.fork()
    if child == 0:
        save_for_ever()
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    loaded = hf_calib.load_calibrated(folder)  # an error, were the weights not those of the calibrator
    temperature = float(hf_calib.attached_calibrator(loaded).temperature)
    found.append([sorted(os.listdir(folder)), temperature, float(loaded.classifier.bias.detach()[0]), status])
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_killed_at_any_moment_it_leaves_the_old_folder_or_the_new_one(
    classifier, temperature, tmp_path, in_new_process
):
    temperature.temperature.fill_(2)
    with torch.no_grad():
        classifier.classifier.bias.fill_(1)
    folder = save_calibrated(attach_calibrator(classifier, temperature), tmp_path / "model")
    files = sorted(state(folder))
    waits = torch.linspace(0.01, 0.15, 25).tolist()
    found = in_new_process(SAVE_UNTIL_KILLED, [str(folder), waits])
    for names, fitted, bias, status in found:
        assert names == files
        assert fitted - 1 == bias
        assert status == signal.SIGKILL  # and did not end by itself, of an error
    assert len({fitted for _, fitted, *_ in found}) == 2


# -- what does not belong together


def test_other_weights_are_loaded_with_a_warning(saved, classifier):
    other = plain_load(saved)
    with torch.no_grad():
        other.classifier.bias += 1
    other.save_pretrained(saved)
    with pytest.warns(UserWarning, match="the calibrator was fitted for other weights than these; fit it again"):
        load_calibrated(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"applied": "twice"}, 'applied=\'twice\'; allowed are "attached" and "folded"'),
        ({"applied": None}, "applied=None; allowed"),
        ({"label_names": ["sad", "glad", "calm"]}, r"fitted for \['sad', 'glad', 'calm'\]; allowed are the model's"),
        ({"num_labels": 4, "label_names": None}, "fitted for 4 unnamed labels; allowed are the model's"),
    ],
)
def test_a_record_that_was_tampered_with_is_refused(changes, message, saved):
    forge(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_calibrated(saved)


def test_the_weights_and_the_record_agree_on_how_it_is_applied(saved, applied):
    other = {"attached": "folded", "folded": "attached"}[applied]
    forge(saved, applied=other)
    messages = {"folded": r"the weights, but config\.json does not", "attached": "is folded into its weights"}
    with pytest.raises(ValueError, match=messages[other]):
        load_calibrated(saved)


# -- other processes


FRESH = """
import json, sys
import torch
import hf_calib

names, ids, text = json.load(sys.stdin)
answers = []
for name in names:
    scope, card = {}, open(name + "/README.md").read()
    exec(card.split("```python")[1].split("```")[0], scope)  # the card's own lines
    scores = {entry["label"]: entry["score"] for entry in scope["classifier"](text, top_k=None)}
    with torch.no_grad():
        probs = hf_calib.load_calibrated(name)(torch.tensor(ids)).logits.softmax(-1)
    answers.append([probs.tolist(), scores])
print(json.dumps(answers))
"""


def test_a_new_process_gets_the_same_scores_also_by_the_cards_lines(
    classifier, temperature, tokenizer, tokens, tmp_path, in_new_process
):
    generator = torch.Generator().manual_seed(0)
    isotonic = IsotonicCalibration().fit(
        torch.randn(90, 3, generator=generator), torch.randint(3, (90,), generator=generator)
    )
    text, wanted = "w1 w2 w3", []
    for name, calibrator in {"attached": isotonic, "folded": temperature}.items():
        APPLY[name](classifier, calibrator)
        save_calibrated(classifier, tmp_path / name, processing_class=tokenizer)
        wanted.append([probs_of(classifier, inputs) for inputs in (tokens, tokenizer(text, return_tensors="pt"))])
        remove_calibrator(classifier)
    found = in_new_process(FRESH, [["attached", "folded"], tokens["input_ids"].tolist(), text])
    for (probs, scores), (wanted_probs, wanted_scores) in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(probs), wanted_probs, rtol=0, atol=1e-6)
        scores = torch.tensor([[scores[name] for name in ("sad", "calm", "glad")]])
        torch.testing.assert_close(scores, wanted_scores, rtol=0, atol=1e-6)


def push_client():
    from pathlib import Path

    import pytest
    import torch
    from huggingface_hub import HfApi, hf_hub_download
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    import hf_calib

    ids = torch.tensor([[2, 10, 11, 3], [2, 12, 13, 3]])

    @torch.no_grad()
    def probs_of(model):
        return model(ids).logits.softmax(-1)

    tokenizer = AutoTokenizer.from_pretrained("attached")
    for name in ("attached", "folded"):
        model = hf_calib.load_calibrated(name)
        url = hf_calib.push_calibrated(model, f"org/{name}", processing_class=tokenizer)
        assert f"/org/{name}/commit/" in url
        for repo_id in (f"org/{name}", f"org/{name}-by-itself"):
            if repo_id.endswith("-by-itself"):
                model.push_to_hub(repo_id)
            for _ in range(2):  # downloaded, then from the cache
                assert torch.equal(probs_of(hf_calib.load_calibrated(repo_id)), probs_of(model))
    assert torch.equal(probs_of(AutoModelForSequenceClassification.from_pretrained("org/folded")), probs_of(model))
    hf_calib.push_calibrated(model, "no-owner", private=True)

    hf_calib.push_calibrated(model, "org/kept")
    card = Path(hf_hub_download("org/kept", "README.md")).read_text()
    own = card.replace("# org/kept\n", "# org/kept\n\nTrained by hand.\n")
    uploads = {"README.md": own, "model-00001-of-00002.safetensors": "of a model before"}
    for name, content in uploads.items():
        HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id="org/kept")
    hf_calib.push_calibrated(model, "org/kept")

    for repo_id in ("org/attached", "org/folded"):  # the card's own lines
        scope, card = {}, Path(hf_hub_download(repo_id, "README.md")).read_text()
        exec(card.split("```python\n")[1].split("```")[0], scope)
        scores = {entry["label"]: entry["score"] for entry in scope["classifier"]("w6 w7", top_k=None)}
        own = hf_calib.load_calibrated(repo_id)
        expected = pipeline("text-classification", model=own, tokenizer=tokenizer)("w6 w7", top_k=None)
        assert scores == {entry["label"]: entry["score"] for entry in expected}

    with pytest.raises(FileNotFoundError, match="org/missing: neither a folder nor a Hub repo"):
        hf_calib.load_calibrated("org/missing")


def test_a_repo_is_one_commit_without_pickles_and_comes_back(
    loopback_hub, classifier, temperature, tokenizer, tmp_path
):
    for name, apply in APPLY.items():
        save_calibrated(apply(classifier, temperature), tmp_path / name, processing_class=tokenizer)
        if name == "attached":
            detach_calibrator(classifier)
    loopback_hub.run(push_client, tmp_path)
    for name in APPLY:
        files = loopback_hub.files(f"org/{name}")
        assert set(files) == FILES | {"tokenizer.json", "tokenizer_config.json"}
        assert loopback_hub.commits(f"org/{name}") == ["Upload calibrated model"]
        assert f'"org/{name}"' in files["README.md"].decode()
        assert set(loopback_hub.files(f"org/{name}-by-itself")) >= FILES
        assert len(loopback_hub.commits(f"org/{name}-by-itself")) == 1
    assert '"loopback/no-owner"' in loopback_hub.files("loopback/no-owner")["README.md"].decode()
    kept = loopback_hub.files("org/kept")
    assert "\n# org/kept\n\nTrained by hand.\n" in kept["README.md"].decode()
    assert "model.safetensors" in kept
    assert "model-00001-of-00002.safetensors" not in kept
    assert len(loopback_hub.commits("org/kept")) == 4
