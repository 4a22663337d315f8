"""The model card says what was measured, and how to load the model."""

import re
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from hf_calib import CalibrationReport, attach_calibrator, evaluate_calibration, fold_calibrator, save_calibrated
from hf_calib.attaching import attached_calibrator
from hf_calib.card_text import END, START
from hf_calib.model_card import update_model_card, usage, write_model_card


PROVENANCE = {
    "rows": 20,
    "dataset": "org/moods: a set",
    "split": "validation",
    "report_split": "test",
    "report_rows": "a test split",
    "fingerprint": "0123456789abcdef",
}


@pytest.fixture(scope="module")
def report():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, 3, generator=generator)
    labels = torch.multinomial((logits / 2.5).softmax(-1), 1, generator=generator)[:, 0]
    return evaluate_calibration((logits / 2.5).softmax(-1), labels, before=logits.softmax(-1), num_resamples=50)


@pytest.fixture
def calibrator(temperature):
    temperature.label_names, temperature.provenance = ["sad", "calm", "glad"], dict(PROVENANCE)
    return temperature


TASK = "text-classification"


def card_of(folder, calibrator, applied="attached", report=None, name="org/mood: a name", existing=None):
    write_model_card(
        folder,
        name=name,
        calibrator=calibrator,
        applied=applied,
        task=TASK,
        report=report,
        stock=True,
        existing=existing,
    )
    return ModelCard.load(folder / "README.md")


def test_the_metadata_holds_the_reports_values(calibrator, report, tmp_path):
    data = card_of(tmp_path, calibrator, report=report).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert {"calibration", "hf_calib"} <= set(data.tags)
    assert data.model_name == "org/mood: a name"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name: pytest.approx(estimate.value, abs=1e-6) for name, estimate in report.after.items()
    }
    for result in data.eval_results:
        assert (result.task_type, result.dataset_name, result.dataset_split) == (
            "text-classification",
            "org/moods: a set",
            "test",
        )


@pytest.mark.parametrize("provenance", [PROVENANCE, {}])
@pytest.mark.parametrize("with_report", [True, False])
def test_the_text_has_a_section_for_what_is_known(provenance, with_report, calibrator, report, tmp_path):
    calibrator.provenance = dict(provenance)
    card = card_of(tmp_path, calibrator, report=report if with_report else None)
    assert card.text.lstrip().startswith("# org/mood: a name\n")
    assert "The calibrator is `temperature`." in card.text
    assert "Labels: sad, calm, glad." in card.text
    assert (report.to_markdown() in card.text) == with_report
    assert ("](reliability.png)" in card.text) == with_report == (tmp_path / "reliability.png").is_file()
    assert (card.data.eval_results is not None) == with_report
    known = [
        "Data set: org/moods: a set",
        "Split: validation",
        "Rows: 20",
        "Fingerprint of logits and labels: 01234567",
    ]
    assert [line in card.text for line in known] == [bool(provenance)] * 4
    assert "None" not in card.content
    assert "\n\n\n" not in card.text


def test_the_diagram_is_a_picture(calibrator, report, tmp_path):
    card_of(tmp_path, calibrator, report=report)
    assert (tmp_path / "reliability.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_report_that_was_read_back_has_a_table_and_no_diagram(calibrator, report, tmp_path):
    card = card_of(tmp_path, calibrator, report=CalibrationReport.from_dict(report.to_dict()))
    assert report.to_markdown() in card.text
    assert "reliability.png" not in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_without_matplotlib_there_is_a_warning_and_no_diagram(calibrator, report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_calib.plots", raising=False)
    with pytest.warns(UserWarning, match=r"reliability\.png: not drawn, because .*matplotlib"):
        card = card_of(tmp_path, calibrator, report=report)
    assert "reliability.png" not in card.text
    assert report.to_markdown() in card.text


@pytest.mark.parametrize("applied", ["attached", "folded"])
def test_it_says_how_the_calibrator_is_applied(applied, calibrator, tmp_path):
    card = card_of(tmp_path, calibrator, applied)
    assert ("`hf_calib.load_calibrated` applies it" in card.text) == (applied == "attached")
    assert ("folded into the weights" in card.text) == (applied == "folded")
    assert f"```python\n{usage('org/mood: a name', applied, TASK, stock=True)}\n```" in card.text


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("applied", ["attached", "folded"])
@pytest.mark.parametrize("name", ["org/mood", 'it\'s "mine"', r"C:\new\text"])
def test_its_lines_load_the_model_by_that_name(name, applied, stock, monkeypatch):
    import transformers

    import hf_calib

    loaded = []
    monkeypatch.setattr(hf_calib, "load_calibrated", loaded.append, raising=False)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loaded.append)
    monkeypatch.setattr(transformers, "pipeline", lambda task, model=None, **options: loaded.append(model))
    lines = usage(name, applied, TASK, stock)
    exec(lines, {})
    assert set(loaded) - {None} == {name}
    assert ("import hf_calib" in lines) == (applied == "attached" or not stock)


@pytest.mark.parametrize(("model", "base"), [("org/moods", "org/moods"), ("my-folder", None), (None, None)])
def test_a_base_model_is_named_where_the_hub_has_it(model, base, calibrator, tmp_path):
    if model is not None:
        calibrator.provenance["model"] = model
    assert card_of(tmp_path, calibrator).data.base_model == base


def test_the_values_are_of_the_data_that_the_report_is_about(calibrator, report, tmp_path):
    calibrator.provenance["report_dataset"] = "org/other"
    assert {result.dataset_name for result in card_of(tmp_path, calibrator, report=report).data.eval_results} == {
        "org/other"
    }


def test_the_section_lies_between_its_markers(calibrator, report, tmp_path):
    card = card_of(tmp_path, calibrator, report=report).text
    assert card.startswith(f"\n# org/mood: a name\n\n{START}\n\n## Calibration\n\nA text classifier with")
    assert card.endswith(f"\n- The table's rows: a test split\n\n{END}\n")
    headings = re.findall(r"^#+ .*$", card, flags=re.MULTILINE)
    wanted = ["Before and after", "How to load it", "What the calibrator was fitted on"]
    assert headings[2:] == [f"### {title}" for title in wanted]


THEIRS = "---\nlicense: mit\nlanguage: no\ncustom: {a: [1.10]}\ntags: [mood]\n---\n# Mine\n\nMy own words.\n"


def test_a_card_that_is_there_keeps_all_that_is_not_ours(calibrator, report, tmp_path):
    card_of(tmp_path, calibrator, report=report)
    fresh = (tmp_path / "README.md").read_text()
    card_of(tmp_path, calibrator, report=report, existing=THEIRS)
    first = (tmp_path / "README.md").read_bytes()
    head, text = first.decode().split("\n---\n")
    assert text == f"# Mine\n\nMy own words.\n\n{fresh[fresh.index(START) :]}"
    assert head.startswith(
        "---\nlicense: mit\nlanguage: no\ncustom: {a: [1.10]}\ntags: [mood, calibration, hf_calib]\n"
    )
    assert "pipeline_tag: text-classification\n" in head
    assert fresh[fresh.index("model-index:") : fresh.index("\n---\n\n#")] in head
    card_of(tmp_path, calibrator, report=report, existing=first.decode())
    assert (tmp_path / "README.md").read_bytes() == first


def test_written_again_it_is_the_same(calibrator, report, tmp_path):
    card_of(tmp_path, calibrator, report=report)
    first = (tmp_path / "README.md").read_bytes()
    card_of(tmp_path, calibrator, report=report, existing=first.decode())
    assert (tmp_path / "README.md").read_bytes() == first


def test_windows_line_ends_stay(calibrator, report, tmp_path):
    card_of(tmp_path, calibrator, report=report, existing=THEIRS.replace("\n", "\r\n"))
    content = (tmp_path / "README.md").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 60


def test_a_malformed_card_stays_as_it_is(calibrator, report, tmp_path):
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"^README\.md: the metadata is not valid YAML"):
        card_of(tmp_path, calibrator, report=report, existing="---\na: [\n---\n")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "---\na: [\n---\n"


def test_numbers_of_other_data_and_other_metrics_stay(calibrator, report, tmp_path):
    first = card_of(tmp_path, calibrator, report=report)
    calibrator.provenance |= {"report_split": "later", "report_config": "small"}
    both = card_of(tmp_path, calibrator, report=report, existing=first.content).data.eval_results
    splits = [(result.dataset_config, result.dataset_split, result.metric_type) for result in both]
    assert splits == [
        *((None, "test", name) for name in report.after),
        *(("small", "later", name) for name in report.after),
    ]


def test_a_card_is_updated_in_a_new_folder_or_in_its_own(calibrator, report, tmp_path):
    options = {"name": "mood", "calibrator": calibrator, "applied": "attached", "task": TASK, "stock": True}
    folder = tmp_path / "new" / "mood"
    assert update_model_card(folder, report=report, **options) == ["README.md", "reliability.png"]
    (folder / "weights").write_text("here")
    assert update_model_card(folder, report=None, **options) == ["README.md"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "reliability.png", "weights"]
    assert report.to_markdown() not in (folder / "README.md").read_text()
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(ValueError, match=r"^README\.md"):
        update_model_card(tmp_path / "other", report=report, existing="---\na: [\n---\n", **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def validate_client():
    from pathlib import Path

    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import metadata_load

    for path in sorted(Path().glob("*.md")):
        card = ModelCard.load(path)
        card.validate()
        for result in card.data.eval_results:
            print(
                path.stem, metadata_load(path)["tags"], result.dataset_split, result.metric_type, result.metric_value
            )


def test_the_hubs_client_reads_the_cards_and_validates_them(loopback_hub, calibrator, report, tmp_path):
    for name, existing in (("fresh", None), ("merged", THEIRS)):
        card_of(tmp_path, calibrator, report=report, existing=existing)
        (tmp_path / "README.md").rename(tmp_path / f"{name}.md")
    values = [f"{name} {estimate.value:.6f}".rstrip("0") for name, estimate in report.after.items()]
    assert loopback_hub.run(validate_client, tmp_path).splitlines() == [
        *(f"fresh ['calibration', 'hf_calib'] test {value}" for value in values),
        *(f"merged ['mood', 'calibration', 'hf_calib'] test {value}" for value in values),
    ]


@pytest.mark.parametrize("apply", [attach_calibrator, fold_calibrator])
def test_a_saved_folder_has_the_card_of_its_model(apply, classifier, calibrator, report, tmp_path):
    folder = save_calibrated(apply(classifier, calibrator), tmp_path / "mood", report=report)
    card, applied = (
        ModelCard.load(folder / "README.md"),
        "folded" if attached_calibrator(classifier) is None else "attached",
    )
    assert usage("mood", applied, TASK, stock=True) in card.text
    assert report.to_markdown() in card.text
    assert (folder / "reliability.png").is_file()
    assert not re.search(str(tmp_path), card.content)
