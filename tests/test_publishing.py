"""A folder goes to the Hub as it is, in one commit, and the card that is there keeps its text."""

import json
import re
import shutil
import socket

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard

from hf_calib import IsotonicCalibration, attach_calibrator, evaluate_calibration, save_calibrated
from hf_calib.card_text import START
from hf_calib.publishing import card_of, card_to_keep, check_calibrated_folder

from .forged import forge
from .loopback_hub import File, HubError, LoopbackHub, _Handler
from .tiny import make_classifier, make_tokenizer, mostly_predicted, save_sentiment_classifier


TEXT = "# Moods\n\nMine.\n"
THEIRS = f"---\nlicense: mit\nlanguage: no\ntags:\n- mood\n---\n{TEXT}"
MALFORMED = "---\nlicense: [mit\n---\n"
STATUSES = (400, 401, 403, 404, 409, 412, 500)
DATA = "--dataset rows.jsonl --batch-size 20"
LINES = {
    "new": "push made org/new",
    "mine": "push made mine --private",
    "known": "push made org/known",
    "known again": "push made org/known",
    "malformed": "push made org/malformed",
    **{str(status): f"push made org/{status}" for status in STATUSES},
    "meanwhile": "push made org/meanwhile",
    "gone": "push made org/gone",
    "two slashes": "push made org/a/b",
    "no name": "push made org/--bad",
    "no such token": "push made org/new --token hf_no",
    "fit": f"fit --model org/base {DATA} --output kept --method temperature",
    "fit without a card": f"fit --model org/plain {DATA} --output plain --method temperature",
    "report": "report --model org/mood --dataset later.jsonl --output card",
    "report into the Hub": "report --model org/mood --dataset later.jsonl",
    "report without a calibrator": "report --model org/plain --dataset later.jsonl --output none",
}


class Unwilling(_Handler):
    """A Hub that answers a commit to `org/NUMBER` with that status; somebody else is quicker on `org/meanwhile`.

    When it is asked to make `org/gone`, it hangs up.
    """

    def do_POST(self):
        if self.path == "/api/repos/create" and b'"gone"' in self.rfile.peek():
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.serve()

    def answer(self):
        repo = self.path.removeprefix("/api/models/org/").split("/")[0]
        if "/commit/" in self.path and repo.isdigit():
            raise HubError(int(repo), f"no commits, says {repo}")
        if "/preupload/" in self.path and repo == "meanwhile":
            target = self.hub.repos["model", "org/meanwhile"]
            target.commit("meanwhile", {"README.md": File(b"theirs", lfs=False)})
        return super().answer()


def command_client():
    import contextlib
    import io
    import json
    import sys
    from pathlib import Path

    from hf_calib.cli import main

    for line in json.loads(Path("lines.json").read_text()):
        out, err, code = io.StringIO(), io.StringIO(), 0
        sys.argv = ["hf-calib", *line.split()]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        print(json.dumps([code, out.getvalue(), err.getvalue()]))


def save_mood(folder):
    """A calibrated classifier with all that belongs to it."""
    words = [f"w{index}" for index in range(40)]
    model, generator = make_classifier(["sad", "calm", "glad"], 44), torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 3, generator=generator), torch.arange(60) % 3
    report = evaluate_calibration(logits.softmax(-1), labels, num_resamples=20)
    attach_calibrator(model, IsotonicCalibration().fit(logits, labels))
    return save_calibrated(model, folder, processing_class=make_tokenizer(words), report=report)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models and rows."""
    place = tmp_path_factory.mktemp("publishing")
    made = save_mood(place / "made")
    (made / ".cache" / "huggingface").mkdir(parents=True)
    (made / ".cache" / "huggingface" / "lock").touch()
    (made / "onnx").mkdir()
    (made / "onnx" / "model.onnx").write_bytes(b"\0onnx")
    save_sentiment_classifier(place / "base", num_numbers=60)
    for name, numbers in (("rows", range(40)), ("later", range(40, 60))):
        texts = [f"{'good' if number % 3 else 'bad'} {number}" for number in numbers]
        labels = mostly_predicted(place / "base", texts)
        if name == "later":
            labels = [{"positive": "glad", "negative": "sad"}[label] for label in labels]
        Dataset.from_dict({"text": texts, "label": labels}).to_json(place / f"{name}.jsonl")
    return place


@pytest.fixture(scope="module")
def hub(place):
    """A Hub on which some repos are already, and all the commands that are tested here have run."""
    with LoopbackHub() as hub:
        hub.server.RequestHandlerClass = Unwilling
        hub.put("org/plain", place / "base")
        hub.put("org/mood", place / "made")
        (place / "base" / "README.md").write_text(THEIRS)
        hub.put("org/base", place / "base")
        for name, card in (("known", THEIRS), ("malformed", MALFORMED)):
            (place / name).mkdir()
            (place / name / "README.md").write_text(card)
            hub.put(f"org/{name}", place / name)
        (place / "lines.json").write_text(json.dumps(list(LINES.values())))
        printed = hub.run(command_client, place).splitlines()
        hub.results = dict(zip(LINES, map(json.loads, printed), strict=True))
        yield hub
    assert hub.outside == []


def local_files(folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith(".cache")}


def card_on(hub, repo_id):
    return hub.files(repo_id)["README.md"].decode()


# -- push


@pytest.mark.parametrize("name", ["org/new", "org/known", "loopback/mine"])
def test_the_files_are_those_of_the_folder(name, hub, place):
    local, pushed = local_files(place / "made"), hub.files(name)
    assert set(pushed) == set(local) >= {"README.md", "reliability.png", "onnx/model.onnx", "model.safetensors"}
    assert [key for key in local if pushed[key] != local[key]] == ["README.md"]


@pytest.mark.parametrize(("line", "name"), [("new", "org/new"), ("mine", "loopback/mine")])
def test_a_new_repo_is_one_commit_and_its_card_has_its_name(line, name, hub, place):
    code, out, err = hub.results[line]
    assert (code, err) == (0, "")
    assert out.startswith(f"{hub.url}/{name}/commit/")
    assert out.count("\n") == 1
    assert hub.commits(name) == ["Upload calibrated model"]
    card = (place / "made" / "README.md").read_text()
    for old, new in (('"made"', f'"{name}"'), ("\n# made\n", f"\n# {name}\n"), ("name: made\n", f"name: {name}\n")):
        assert old in card
        card = card.replace(old, new)
    assert card_on(hub, name) == card


def test_a_repo_is_private_if_it_is_to_be(hub):
    assert hub.repos["model", "loopback/mine"].private
    assert not hub.repos["model", "org/new"].private


def test_the_card_of_the_repo_keeps_its_text(hub):
    card, fresh = card_on(hub, "org/known"), card_on(hub, "org/new")
    section = fresh[fresh.index(START) :].replace("org/new", "org/known")
    assert card.startswith("---\nlicense: mit\nlanguage: no\ntags:\n- mood\n- calibration\n- hf_calib\n")
    assert card.endswith(f"\n---\n{TEXT}\n{section}")
    data = ModelCard(card).data
    assert (data.model_name, len(data.eval_results)) == ("org/known", 5)
    for line in ("known", "known again"):
        note, url = hub.results[line][1].splitlines()
        assert note == "The repo's README.md keeps its text; the section on calibration is new."
        assert f"{hub.url}/org/known/commit/" in url


@pytest.mark.parametrize("status", STATUSES)
def test_a_refusal_is_one_line_with_what_the_hub_says(status, hub):
    code, out, err = hub.results[str(status)]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"hf-calib: repo_id: cannot push to 'org/{status}': ")
    assert f"no commits, says {status}" in err
    assert hub.commits(f"org/{status}") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("malformed", "'org/malformed': README.md: the metadata is not valid YAML"),
        ("meanwhile", "'org/meanwhile': .*A commit has happened since"),
        ("gone", "'org/gone': .*disconnected"),
        ("two slashes", "'org/a/b': "),
        ("no name", "'org/--bad': .*alphanumeric"),
        ("no such token", "'org/new': .*401.*Invalid username or password"),
    ],
)
def test_what_goes_wrong_is_one_line_and_changes_nothing(line, words, hub):
    code, out, err = hub.results[line]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"hf-calib: repo_id: cannot push to {words}", err)
    assert hub.files("org/meanwhile") == {"README.md": b"theirs"}
    assert hub.files("org/malformed") == {"README.md": MALFORMED.encode()}
    assert len(hub.commits("org/new")) == 1


# -- fit and report of models on the Hub


def test_fit_keeps_the_card_of_a_hub_model(hub, place):
    assert hub.results["fit"][0] == hub.results["fit without a card"][0] == 0
    assert hub.results["fit"][2] == hub.results["fit without a card"][2] == ""
    card = (place / "kept" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlanguage: no\ntags:\n- mood\n- calibration\n- hf_calib\n")
    assert f"\n---\n{TEXT}\n{START}\n" in card
    assert 'model="kept")' in card
    assert ModelCard(card).data.base_model == "org/base"
    assert (place / "plain" / "README.md").read_text().split("---\n")[2].startswith("\n# plain\n")


def test_report_writes_the_card_of_a_hub_model_into_a_new_folder(hub, place):
    code, out, err = hub.results["report"]
    assert (code, err) == (0, "")
    assert "20 rows; in brackets" in out
    assert out.endswith("Wrote README.md and reliability.png in card.\n")
    assert sorted(path.name for path in (place / "card").iterdir()) == ["README.md", "reliability.png"]
    before, after = card_on(hub, "org/mood"), (place / "card" / "README.md").read_text()
    assert "20 rows; in brackets" in after
    assert "- The table's rows: dataset later.jsonl; reported on after the fit, by hf-calib report\n" in after
    for card in (before, after):
        assert card[card.index("\n---\n\n# ") : card.index(START)] == "\n---\n\n# made\n\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("report into the Hub", "output: got none; allowed is a new folder, since org/mood is no folder"),
        (
            "report without a calibrator",
            "model: cannot load 'org/plain': .*: the repo holds no calibrator.json",
        ),
    ],
)
def test_report_refuses_in_one_line(line, words, hub, place):
    code, out, err = hub.results[line]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"hf-calib: {words}", err)
    assert not (place / "none").exists()


# -- without a Hub


@pytest.fixture
def saved(place, tmp_path):
    return shutil.copytree(place / "made", tmp_path / "made")


def test_a_saved_folder_is_fine(saved):
    check_calibrated_folder(saved)
    (saved / "config.json").rename(saved / "adapter_config.json")
    check_calibrated_folder(saved)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "folder: got .*made; allowed is a folder that hf-calib fit"),
        (lambda folder: (folder / "calibrator.json").unlink(), FileNotFoundError, r"holds no calibrator\.json"),
        (lambda folder: forge(folder, type="magic"), ValueError, "type 'magic' is unknown"),
        (
            lambda folder: (folder / "calibrator.safetensors").write_bytes(b""),
            ValueError,
            "not a readable safetensors",
        ),
        (lambda folder: forge(folder, applied=None), ValueError, "folder: .*applied=None; allowed are"),
        (lambda folder: forge(folder, weights="0" * 64), ValueError, "folder: the weights in .* are not those"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"folder: .* holds no config\.json and"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "folder: .* holds no weights"),
    ],
)
def test_what_could_not_be_loaded_is_refused(damage, error, message, saved):
    damage(saved)
    with pytest.raises(error, match=message):
        check_calibrated_folder(saved)


def test_pickles_are_refused_by_name(saved):
    (saved / "checkpoint").mkdir()
    for name in ("training_args.bin", "checkpoint/optimizer.pt", "a.pkl", "b.ckpt", "c.pth"):
        (saved / name).touch()
    names = r"a\.pkl, b\.ckpt, c\.pth, checkpoint/optimizer\.pt, training_args\.bin;"
    with pytest.raises(ValueError, match=rf"^folder: .*made holds {names}"):
        check_calibrated_folder(saved)


def test_a_card_that_cannot_be_kept_is_a_warning(tmp_path):
    assert card_of(str(tmp_path)) is card_to_keep(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"^README\.md: the metadata is not valid"):
        card_of(str(tmp_path))
    with pytest.warns(UserWarning, match=r"the new card does not keep the text of its card \(README\.md: the meta"):
        assert card_to_keep(str(tmp_path)) is None
    with pytest.warns(UserWarning, match="org/elsewhere: the new card does not keep the text of its card"):
        assert card_to_keep("org/elsewhere") is None
