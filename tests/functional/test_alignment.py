"""The alignment is the first of all cheapest ones, in an order that is stated; a brute force tries every one."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import word_error_rate

from hf_calib.functional.alignment import kept_tokens


PAIR, INSERTION, DELETION = 0, 1, 2  # in order of preference
few_tokens = st.lists(st.integers(0, 2), max_size=5)


def batch(rows):
    """Ragged rows as a tensor, and which of its tokens are real."""
    width = max(map(len, rows), default=0)
    padded = [row + [7] * (width - len(row)) for row in rows]
    real = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    shape = (len(rows), width)
    return torch.tensor(padded).long().reshape(shape), torch.tensor(real).bool().reshape(shape)


def kept(tokens, references):
    (tokens, real), (references, expected) = batch(tokens), batch(references)
    return kept_tokens(tokens, references, real, expected)


def edits(tokens, references):
    """Every way to turn one list into the other, from the end: its cost, its steps, and the tokens that it keeps."""
    if not tokens and not references:
        yield 0, (), ()
    if tokens and references:
        same = tokens[-1] == references[-1]
        for cost, steps, found in edits(tokens[:-1], references[:-1]):
            yield cost + (not same), (PAIR, *steps), (*found, same)
    if tokens:
        for cost, steps, found in edits(tokens[:-1], references):
            yield cost + 1, (INSERTION, *steps), (*found, False)
    if references:
        for cost, steps, found in edits(tokens, references[:-1]):
            yield cost + 1, (DELETION, *steps), found


@settings(max_examples=80, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(few_tokens, few_tokens), min_size=1, max_size=4))
def test_the_alignment_is_the_first_of_the_cheapest_of_all(rows):
    found = kept(*zip(*rows, strict=True))
    for (tokens, references), row in zip(rows, found.tolist(), strict=True):
        *_, expected = min(edits(tokens, references))
        assert row[: len(tokens)] == list(expected)
        assert not any(row[len(tokens) :])


@pytest.mark.parametrize(
    ("tokens", "references", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], [1, 1, 1]),
        ([1, 9, 2, 3], [1, 2, 3], [1, 0, 1, 1]),  # one too many
        ([1, 3], [1, 2, 3], [1, 1]),  # one too few
        ([1, 9, 3], [1, 2, 3], [1, 0, 1]),  # another one
        ([2, 1], [1, 2], [0, 0]),  # replacing both costs as much as moving one
        ([1, 1], [1], [0, 1]),  # read from the end: the last of equals
        ([1], [], [0]),
        ([], [1], []),
    ],
)
def test_alignments_by_hand(tokens, references, expected):
    assert kept([tokens], [references]).tolist() == [[bool(value) for value in expected]]


def test_long_texts_keep_what_the_word_error_rate_allows():
    """In texts as long as their references a wrong token is one edit, or two: inserted, and another one deleted."""
    tokens, references = torch.randint(4, (2, 20, 30), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    for row, reference, found in zip(tokens, references, kept_tokens(tokens, references, real, real), strict=True):
        texts = (" ".join(map(str, text.tolist())) for text in (row, reference))
        edits_needed = round(word_error_rate(*([text] for text in texts)).item() * 30)
        wrong = 30 - int(found.sum())
        assert wrong <= edits_needed <= 2 * wrong


def test_padding_may_lie_anywhere():
    tokens, references = [1, 2, 3, 1], [2, 3, 3]
    expected = kept([tokens], [references])[0].tolist()
    for gaps in product((0, 1), repeat=4):
        spread, real = [], []
        for gap, token in zip(gaps, tokens, strict=True):
            spread += [2] * gap + [token]
            real += [False] * gap + [True]
        real = torch.tensor([real])
        found = kept_tokens(torch.tensor([spread]), torch.tensor([references]), real, torch.ones(1, 3).bool())
        assert found[real].tolist() == expected
        assert not found[~real].any()
