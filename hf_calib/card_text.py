"""A model card that is there already: what is ours goes into its text, and all that others wrote stays as it is.

Our part of the text is the section between two marker lines, our part of the metadata is a few keys. The metadata is
edited as text, and only a key that changes is written anew: huggingface_hub's `ModelCard` reads `language: no` as
false and `version: 1.10` as 1.1, and loses comments, empty keys, and what it does not know of in a `model-index`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import textwrap
from pathlib import Path

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .report import TITLES


CARD_NAME = "README.md"
START, END = "<!-- hf_calib: start -->", "<!-- hf_calib: end -->"
TAGS = ("calibration", "hf_calib")
IF_MISSING = ("library_name", "pipeline_tag", "base_model")
MARK_OF_OURS = "smooth_ece"  # in a model-index: every report has it, and nobody else gives it that name
SAME_NUMBERS = (("task", "type"), *(("dataset", key) for key in ("type", "config", "split", "revision")), ("source",))
METRIC = ("type", "args", "config")
# What loads a model in the lines that a card shows, up to its quoted name
LOADED = re.compile(r'((?:load_calibrated\(|from_pretrained\(|model=))("(?:[^"\\]|\\.)*")')


def read_model_card(folder: Path) -> str | None:
    """The text of a folder's `README.md`, line ends as they are; None where there is none.

    Raises:
        ValueError: it is not UTF-8.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from None


def replace_model_card(folder: Path, text: str) -> None:
    """Writes `README.md`, whole or not at all."""
    partial = folder / f".{CARD_NAME}-partial"
    try:
        partial.write_bytes(text.encode())
        os.replace(partial, folder / CARD_NAME)
    finally:
        partial.unlink(missing_ok=True)


def check_card(card: str) -> None:
    """Raises a ValueError that begins with README.md unless our part can be put into this card."""
    parts = _Card(card)
    _compose(parts.metadata)
    _section_span(parts.text)


def merge_cards(existing: str, ours: str) -> str:
    """A card with our part of another one in it.

    Args:
        existing (`str`): a card of anybody. Its text stays byte for byte outside our section, which is replaced, or
            added at its end; its metadata stays but for our two tags, `library_name`, `pipeline_tag` and `base_model`
            where it has none, and the numbers of our reports in its `model-index`. There a number of the same task,
            data set (with configuration, split, revision and source) and metric is replaced. Comments inside tags and
            `model-index` are lost when these change.
        ours (`str`): a card with our section.
    Returns:
        the card, with the line ends of `existing`. Merging once more gives the same bytes.
    Raises:
        ValueError: the metadata of `existing` is malformed, or one of the two marker lines has no partner. The message
            begins with README.md.
    """
    theirs, mine = _Card(existing), _Card(ours)
    changes = _changes(_compose(theirs.metadata), _compose(mine.metadata))
    section = _section(mine.text)
    text = theirs.text if section is None else _with_section(theirs.text, section, theirs.line_end)
    return theirs.joined(_edited(theirs.metadata, changes, theirs.line_end), text)


def card_name(card: str) -> str | None:
    """The folder or repo that the lines of our section load; None where there are none."""
    found = LOADED.search(_section(_Card(card).text) or "")
    return json.loads(found[2]) if found else None


def rename_card(card: str, name: str) -> str:
    """A card whose section loads the model by another name.

    The title and the name in the `model-index` change where they were the old name; nothing else does.
    """
    old, parts = card_name(card), _Card(card)
    if old is None:
        return card
    start, end = _section_span(parts.text)
    quoted = json.dumps(name, ensure_ascii=False)
    section = LOADED.sub(lambda found: found[1] + quoted, parts.text[start:end])
    before = re.sub(
        rf"\A(\s*# ){re.escape(old)}(?=\r?$)", lambda title: title[1] + name, parts.text[:start], flags=re.M
    )
    index = _get(_compose(parts.metadata), "model-index")
    changes = {}
    for entry in _items(index):
        if _field(entry, "name") == old:
            _get(entry, "name").value = name
            changes = {"model-index": index}
    return parts.joined(_edited(parts.metadata, changes, parts.line_end), before + section + parts.text[end:])


# -- the text


class _Card:
    """A card taken apart; `joined` puts it together again."""

    def __init__(self, card: str):
        self.mark = "\ufeff" * card.startswith("\ufeff")  # of the byte order, which some editors write
        card = card.removeprefix("\ufeff")
        self.line_end = "\r\n" if 2 * card.count("\r\n") > card.count("\n") else "\n"
        if found := REGEX_YAML_BLOCK.search(card):
            self.opening, self.metadata, self.closing, _ = found.groups()
            self.text = card[found.end() :]
        else:
            self.opening, self.metadata, self.closing = "---\n", "", "\n---\n\n"
            self.opening, self.closing = (part.replace("\n", self.line_end) for part in (self.opening, self.closing))
            self.text = card

    def joined(self, metadata: str, text: str) -> str:
        return f"{self.mark}{self.opening}{metadata}{self.closing}{text}"


def _section_span(text: str) -> tuple[int, int] | None:
    """Where our section begins and ends."""
    starts, ends = (
        [found.span() for found in re.finditer(rf"^{re.escape(marker)}(?=[ \t]*\r?$)", text, flags=re.MULTILINE)]
        for marker in (START, END)
    )
    if not starts and not ends:
        return None
    if len(starts) != 1 or len(ends) != 1 or starts > ends:
        raise ValueError(
            f"{CARD_NAME}: got {len(starts)} lines {START} and {len(ends)} lines {END}; allowed are one of each, in "
            "this order, around the section of hf_calib, or none"
        )
    return starts[0][0], ends[0][1]


def _section(text: str) -> str | None:
    span = _section_span(text)
    return None if span is None else text[slice(*span)]


def _with_section(text: str, section: str, line_end: str) -> str:
    section = section.replace("\r\n", "\n").replace("\n", line_end)
    if span := _section_span(text):
        return text[: span[0]] + section + text[span[1] :]
    gap = text and line_end * (2 - (text.endswith("\n") + text.endswith(("\n\n", "\r\n\r\n"))))
    return f"{text}{gap}{section}{line_end}"


# -- the metadata


def _compose(metadata: str) -> yaml.MappingNode:
    """The tree of the metadata: unlike values, its nodes know how and where each of them is written."""
    try:
        root = yaml.compose(metadata, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "what it holds cannot be read"
        where = getattr(error, "problem_mark", None)
        line = f" in its line {where.line + 1}" if where else ""
        raise ValueError(f"{CARD_NAME}: the metadata is not valid YAML ({problem}{line}); correct it first") from None
    if root is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [], flow_style=False)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{CARD_NAME}: its metadata is a {root.id}; allowed are keys and values, or none")
    if not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise ValueError(f"{CARD_NAME}: its metadata has keys that are lists or mappings; allowed are words")
    names = [key.value for key, _ in root.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{CARD_NAME}: its metadata has {', '.join(twice)} twice; allowed is once")
    return root


def _changes(theirs: yaml.MappingNode, ours: yaml.MappingNode) -> dict[str, yaml.Node]:
    """The keys that are to be written anew, with their values."""
    found = {key: _get(ours, key) for key in IF_MISSING if _get(theirs, key) is None}
    found |= {"tags": _merged_tags(_get(theirs, "tags")), "model-index": _merged_index(theirs, ours)}
    return {
        key: value
        for key, value in found.items()
        if value is not None and _written(key, value) != _written(key, _get(theirs, key))
    }


def _merged_tags(theirs: yaml.Node | None) -> yaml.Node:
    if isinstance(theirs, yaml.MappingNode):
        raise ValueError(f"{CARD_NAME}: its tags are a mapping; allowed are a list, one word, or none")
    merged = yaml.SequenceNode("tag:yaml.org,2002:seq", [], flow_style=False)
    if isinstance(theirs, yaml.SequenceNode):
        merged.flow_style, merged.value = theirs.flow_style and bool(theirs.value), list(theirs.value)
    elif theirs is not None:
        merged.value = [theirs]
    known = [tag.value for tag in merged.value]
    merged.value += [yaml.ScalarNode("tag:yaml.org,2002:str", tag) for tag in TAGS if tag not in known]
    return merged


def _merged_index(theirs: yaml.MappingNode, ours: yaml.MappingNode) -> yaml.Node | None:
    """Their `model-index` with the numbers of our reports in it."""
    mine = [(entry, result) for entry in _items(_get(ours, "model-index")) for result in _our_results(entry)]
    merged = copy.deepcopy(_get(theirs, "model-index"))
    if not mine:
        return merged
    if merged is None or not merged.value:
        entry = copy.deepcopy(mine[0][0])
        _get(entry, "results").value = []
        merged = yaml.SequenceNode("tag:yaml.org,2002:seq", [entry], flow_style=False)
    lists = [_get(entry, "results") for entry in _items(merged)]
    if not lists or not all(isinstance(results, yaml.SequenceNode) for results in lists):
        raise ValueError(f"{CARD_NAME}: its model-index is not a list of entries with a name and a list of results")
    for _, result in mine:
        _put_result(result, lists)
    return merged


def _our_results(entry: yaml.Node) -> list[yaml.Node]:
    """Results of our reports in an entry of a `model-index`, without numbers that others have added to them."""
    found = []
    for result in copy.deepcopy(_items(_get(entry, "results"))):
        metrics = _items(_get(result, "metrics"))
        if MARK_OF_OURS in [_field(metric, "type") for metric in metrics]:
            _get(result, "metrics").value = [metric for metric in metrics if _field(metric, "type") in TITLES]
            found.append(result)
    return found


def _put_result(result: yaml.Node, lists: list[yaml.SequenceNode]) -> None:
    """Replaces numbers of the same metric on the same data, and adds the others."""
    same = [
        metrics
        for results in lists
        for their in results.value
        if _fields(their, SAME_NUMBERS) == _fields(result, SAME_NUMBERS)
        and isinstance(metrics := _get(their, "metrics"), yaml.SequenceNode)
    ]
    if not same:
        lists[0].value.append(result)
        return
    names = [(name,) for name in METRIC]
    mine = {_fields(metric, names): metric for metric in _items(_get(result, "metrics"))}
    there = {_fields(metric, names) for metrics in same for metric in metrics.value}
    for metrics in same:
        metrics.value = [copy.deepcopy(mine.get(_fields(metric, names), metric)) for metric in metrics.value]
    same[0].value += [metric for kind, metric in mine.items() if kind not in there]


def _edited(metadata: str, changes: dict[str, yaml.Node], line_end: str) -> str:
    """The text of the metadata with the values of some keys written anew, or added at its end."""
    root = _compose(metadata)
    kept = _all_but(root, changes)
    if changes and root.flow_style:  # in braces: on lines of their own, keys can be replaced one by one
        root.flow_style = False
        metadata = _dump(root).rstrip().replace("\n", line_end) if root.value else ""
        root = _compose(metadata)
    margin = " " * (root.start_mark.column if root.value else 0)
    spans = {key.value: (key.start_mark.index, _end(value)) for key, value in root.value}
    for key in sorted(
        changes, key=lambda key: spans.get(key, (-1,)), reverse=True
    ):  # from the end, so that places hold
        lines = textwrap.indent(_written(key, changes[key]), margin).strip()
        if key in spans:
            start, end = spans[key]
            tail = metadata[len(metadata[:end].rstrip()) : end]  # a line end belongs to some values
            metadata = metadata[:start] + lines.replace("\n", line_end) + tail + metadata[end:]
    for key in (key for key in changes if key not in spans):
        lines = textwrap.indent(_written(key, changes[key]), margin).rstrip().replace("\n", line_end)
        metadata = metadata + line_end * bool(metadata) + lines
    if not changes or _reads_as(metadata, kept, changes):
        return metadata
    raise ValueError(f"{CARD_NAME}: its metadata has anchors or complex keys; allowed are plain keys and values")


def _reads_as(metadata: str, kept: list[tuple[str, str]], changes: dict[str, yaml.Node]) -> bool:
    """Whether nothing but what was to change has changed, whatever the text before held."""
    try:
        return _all_but(_compose(metadata), changes) == kept
    except ValueError:
        return False


def _end(node: yaml.Node) -> int:
    """Where the text of a value ends: a collection's own mark is behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.index


def _written(key: str, value: yaml.Node | None) -> str:
    """The lines of one key."""
    if value is None:
        return ""
    name = yaml.ScalarNode("tag:yaml.org,2002:str", key)
    return _dump(yaml.MappingNode("tag:yaml.org,2002:map", [(name, value)], flow_style=False))


def _dump(node: yaml.Node) -> str:
    return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=float("inf"))


def _all_but(root: yaml.MappingNode, changes: dict[str, yaml.Node]) -> list[tuple[str, str]]:
    return [(_dump(key), _dump(value)) for key, value in root.value if key.value not in changes]


def _get(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The value of a key; None where there is none, or it is empty."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    found = next((value for name, value in pairs if name.value == key), None)
    return None if found is None or found.tag == "tag:yaml.org,2002:null" else found


def _items(node: yaml.Node | None) -> list[yaml.Node]:
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _field(node: yaml.Node | None, *path: str) -> str | None:
    """What is written at the end of a path of keys."""
    for key in path:
        node = _get(node, key)
    return node.value if isinstance(node, yaml.ScalarNode) else node and _dump(node)


def _fields(node: yaml.Node, paths: tuple[tuple[str, ...], ...]) -> tuple[str | None, ...]:
    return tuple(_field(node, *path) for path in paths)
