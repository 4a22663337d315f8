"""Our section and our metadata go into anybody's card; every other byte of it stays."""

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_calib.card_text import (
    END,
    START,
    card_name,
    check_card,
    merge_cards,
    read_model_card,
    rename_card,
    replace_model_card,
)


def index(name="made", value=0.4, split="test"):
    return (
        f"model-index:\n- name: {name}\n  results:\n  - task:\n      type: text-classification\n    dataset:\n"
        f"      name: org/moods\n      type: org/moods\n      split: {split}\n    metrics:\n"
        f"    - type: accuracy\n      value: 0.9\n    - type: nll\n      value: {value}\n"
        f"    - type: smooth_ece\n      value: 0.01\n"
    )


def section(words="the table", name="made"):
    return f'{START}\n\n{words}\n\n```python\nmodel = hf_calib.load_calibrated("{name}")\n```\n\n{END}'


def our_card(name="made", words="the table", **numbers):
    metadata = "library_name: transformers\npipeline_tag: text-classification\nbase_model: org/base\n"
    tags = "tags:\n- calibration\n- hf_calib\n"
    return f"---\n{metadata}{tags}{index(name, **numbers)}---\n\n# {name}\n\n{section(words, name)}\n"


OURS = our_card()
METADATA = """\
# who made it
license: mit  # see LICENSE
language:
- no
- en
version: 1.10
empty:
datasets: [glue, "imdb"]
library_name: sentence-transformers
tags:
- sentiment
- 'generated_from_trainer'

# what it costs
co2_eq_emissions:
  emissions: 0.50
  source: "codecarbon"
widget:
- text: 'I like you. I love you'
  output:
  - {label: POSITIVE, score: 0.8}
folded: >
  a text

base_model: org/first
model-index:
- name: theirs
  extra: 1
  results:
  - task: {type: text-classification}
    dataset: {name: Moods, type: org/moods, config: no, split: test}
    metrics:
    - {type: accuracy, value: 0.50, note: kept}
    source: {name: Board, url: 'https://example.org'}
  - task: {type: text-classification, name: Mood}
    dataset: {name: Moods, type: org/moods, split: test}
    metrics:
    - {type: f1, value: 0.7}
    - {type: accuracy, value: 0.8, verified: true}
    - {type: accuracy, value: 0.81, args: {top: 2}}
- name: other
  results: []
"""
TEXT = "\n# My model   \n\nIt is *good*.\t\n\n<!-- a comment -->\n\n---\n\nMore: ümläut 🤗\n"
EXISTING = f"---\n{METADATA}---\n{TEXT}"


def test_every_other_byte_stays():
    merged = merge_cards(EXISTING, OURS)
    head, tags = METADATA.split("- 'generated_from_trainer'\n")
    tags, _ = tags.split("model-index:")
    assert merged.startswith(f"---\n{head}- 'generated_from_trainer'\n- calibration\n- hf_calib\n{tags}model-index:\n")
    assert merged.endswith(f"\npipeline_tag: text-classification\n---\n{TEXT}\n{section()}\n")


def test_our_numbers_replace_those_of_the_same_kind_and_no_others():
    metadata = yaml.safe_load(merge_cards(EXISTING, OURS).split("\n---\n")[0].removeprefix("---"))
    theirs = yaml.safe_load(METADATA)
    first, second = metadata["model-index"][0]["results"]
    assert first == theirs["model-index"][0]["results"][0], "it has a configuration and a source"
    assert "config: no," in merge_cards(EXISTING, OURS), "and is written as it was"
    kinds = [(metric["type"], metric["value"], sorted(metric)) for metric in second["metrics"]]
    assert kinds == [
        ("f1", 0.7, ["type", "value"]),
        ("accuracy", 0.9, ["type", "value"]),
        ("accuracy", 0.81, ["args", "type", "value"]),
        ("nll", 0.4, ["type", "value"]),
        ("smooth_ece", 0.01, ["type", "value"]),
    ]
    assert second["task"] == {"type": "text-classification", "name": "Mood"}
    assert metadata["model-index"][1:] == theirs["model-index"][1:]
    assert metadata["model-index"][0]["extra"] == 1


def test_numbers_on_other_rows_are_added():
    merged = merge_cards(merge_cards(EXISTING, OURS), our_card(split="later", value=0.3))
    results = ModelCard(merged).data.eval_results
    nll = {result.dataset_split: result.metric_value for result in results if result.metric_type == "nll"}
    assert nll == {"test": 0.4, "later": 0.3}


def test_what_is_missing_is_set_and_what_is_there_is_not():
    data = ModelCard(merge_cards(EXISTING, OURS)).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "text-classification")
    assert data.base_model == "org/first"
    assert data.tags == ["sentiment", "generated_from_trainer", "calibration", "hf_calib"]


CARDS = {
    "full": EXISTING,
    "ours": OURS,
    "no front matter": "# Mine\n\ntext\n",
    "no line end": "# Mine",
    "a blank line at its end": "# Mine\n\n",
    "nothing": "",
    "blank": "\n \n",
    "CRLF": EXISTING.replace("\n", "\r\n"),
    "CRLF without front matter": "# Mine\r\n\r\ntext\r\n",
    "byte order mark": "\ufeff" + EXISTING,
    "braces": "---\n{license: mit, tags: [a], language: no}\n---\ntext\n",
    "empty braces": "---\n{}\n---\ntext\n",
    "comments alone": "---\n# nothing yet\n---\ntext\n",
    "indented": "---\n  license: mit\n  tags:\n    - a\n  x: 1\n---\ntext\n",
    "one tag": "---\ntags: a\nlicense: mit\n---\ntext\n",
    "flow tags": "---\ntags: [a, b]  # two\nlicense: mit\n---\ntext\n",
    "no tags": "---\ntags: []\nmodel-index: []\nlicense: mit\n---\ntext\n",
    "empty keys": "---\ntags:\nmodel-index:\nlibrary_name: null\nbase_model: ~\nlicense: mit\n---\ntext\n",
    "tags last": "---\nlicense: mit\ntags:\n- a # first\n# the end\n---\ntext\n",
    "folded tag": "---\ntags:\n- >\n  a\n\nlicense: mit\n---\ntext\n",
    "a section in the middle": f"# Mine\n\n{section('old')}\n\nmore\n",
    "a section between CRLF": f"# Mine\n\n{section('old')}\n\nmore\n".replace("\n", "\r\n"),
    "a trailing blank": f"# Mine\n\n{START} \nold\n{END}\t\nmore\n",
    "a marker in a line": f"# Mine\n\nwrite `{START}` and\n",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_merging_is_lossless_and_twice_is_once(card):
    merged = merge_cards(card, OURS)
    assert merge_cards(merged, OURS) == merged
    line_end = "\r\n" if "\r\n" in card else "\n"
    assert merged.count("\n") == merged.count(line_end)
    assert merged.count(section().replace("\n", line_end)) == 1
    if "text" in card:
        assert "text" in merged
    for line in ("more", "license: mit", "# nothing yet", "# the end", "\ufeff", "# two"):
        assert merged.count(line) == card.count(line), line
    data = yaml.safe_load(merged.removeprefix("\ufeff").replace("\r\n", "\n").split("\n---\n")[0].removeprefix("---"))
    assert {"calibration", "hf_calib"} <= set(data["tags"])
    assert data["library_name"]
    assert any(result["dataset"]["split"] == "test" for entry in data["model-index"] for result in entry["results"])
    other = merge_cards(merged, our_card(words="another table", value=0.2))
    assert merge_cards(other, OURS) == merged, "only our own part has changed"


def test_without_a_section_of_ours_the_text_stays():
    assert merge_cards(EXISTING, OURS.replace(section(), "")).endswith(f"---\n{TEXT}")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nlicense: [mit\n---\ntext\n", r"^README\.md: the metadata is not valid YAML \(.* in its line 1\)"),
        ("---\na: b: c\n---\ntext\n", r"^README\.md: the metadata is not valid YAML \(mapping values"),
        ("---\n\x07: a\n---\ntext\n", r"^README\.md: the metadata is not valid YAML \(what it holds cannot"),
        ("---\njust words\n---\ntext\n", r"^README\.md: its metadata is a scalar; allowed are keys and values"),
        ("---\n- a\n---\ntext\n", r"^README\.md: its metadata is a sequence"),
        ("---\n? [a]\n: b\n---\ntext\n", r"^README\.md: its metadata has keys that are lists"),
        ("---\ntags: [a]\ntags: [b]\n---\ntext\n", r"^README\.md: its metadata has tags twice; allowed is once"),
        (f"# Mine\n{START}\nold\n", r"^README\.md: got 1 lines .* and 0 lines"),
        (f"# Mine\n{END}\nold\n", r"^README\.md: got 0 lines .* and 1 lines"),
        (f"# Mine\n{END}\nold\n{START}\n", r"^README\.md: got 1 lines .* in this order"),
        (f"# Mine\n{section()}\n{section()}\n", r"^README\.md: got 2 lines .* and 2 lines"),
    ],
)
def test_a_malformed_card_is_an_error_that_names_it(card, message):
    for refuse in (check_card, lambda card: merge_cards(card, OURS)):
        with pytest.raises(ValueError, match=message):
            refuse(card)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("tags: {a: b}", "its tags are a mapping"),
        ("model-index: {name: x}", "its model-index is not a list"),
        ("model-index:\n- name: x", "its model-index is not a list"),
        ("model-index:\n- just words", "its model-index is not a list"),
        ("? tags\n: [a]", "anchors or complex keys"),
        ("tags: &tags [a]\nothers: *tags", "anchors or complex keys"),
        ("others: &tags [a]\ntags: *tags", "anchors or complex keys"),
        ("license: mit\n...", "anchors or complex keys"),
    ],
)
def test_what_cannot_be_edited_is_an_error(metadata, message):
    with pytest.raises(ValueError, match=rf"^README\.md: .*{message}"):
        merge_cards(f"---\n{metadata}\n---\ntext\n", OURS)


def test_an_index_of_others_is_none_of_ours():
    """A folder's card may hold numbers of the model that it was made from."""
    others = index().replace("smooth_ece", "f1").replace("org/moods", "org/others")
    ours = OURS.replace("model-index:\n", others).replace(
        "    - type: accuracy\n", "    - type: mine\n      value: 1\n    - type: accuracy\n", 1
    )
    merged = merge_cards("# Mine\n", ours)
    assert "org/others" in ours
    assert "org/others" not in merged


# -- names


def test_the_name_is_that_of_the_lines():
    assert card_name(our_card('it\'s \\"mine\\"')) == 'it\'s "mine"'
    assert card_name(EXISTING) is None
    assert card_name(OURS.replace("load_calibrated", "look_at")) is None


def test_a_renamed_card_loads_by_the_new_name():
    assert rename_card(OURS, "me/new") == our_card("me/new")
    assert rename_card(OURS.replace("\n", "\r\n"), "me/new") == our_card("me/new").replace("\n", "\r\n")
    assert rename_card(rename_card(OURS, "me/new"), "made") == OURS


def test_what_has_another_name_keeps_it():
    card = merge_cards(EXISTING, OURS)
    assert rename_card(card, "me/new") == card.replace('"made"', '"me/new"')
    assert rename_card(EXISTING, "me/new") == EXISTING
    below = OURS.replace("# made\n", "# Mine\n\n```\n# made\n```\n")
    assert rename_card(below, "me/new").count("# made") == 1


# -- files


def test_a_card_is_read_and_written_with_its_bytes(tmp_path):
    assert read_model_card(tmp_path) is None
    replace_model_card(tmp_path, "\ufeff# ü\r\n")
    assert (tmp_path / "README.md").read_bytes() == b"\xef\xbb\xbf# \xc3\xbc\r\n"
    assert read_model_card(tmp_path) == "\ufeff# ü\r\n"
    (tmp_path / "README.md").write_bytes(b"\xff\xfe#")
    with pytest.raises(ValueError, match=r"README\.md: not a text in UTF-8"):
        read_model_card(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
