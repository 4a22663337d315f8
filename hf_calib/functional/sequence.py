"""Structured outputs as events: tokens, entities, answers and whole sequences that are right or wrong.

Every `*_events` function returns `(confidence, correct)`, `(M,)` floating in `[0, 1]` and `(M,)` int64 in {0, 1}: what
every metric of single events takes. Where nothing is left to judge both are empty, since a batch without entities is
no mistake; it is the metric that refuses to speak of no event at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .alignment import kept_tokens
from .binning import BLOCK_ELEMENTS, bin_numbers, interior_edges
from .calibration import binned_error, checked_events
from .checks import check_choice, check_count, check_probs, describe


Events = tuple[torch.Tensor, torch.Tensor]
REDUCTIONS = {"product": "prod", "mean": "mean", "min": "amin"}  # our word to that of `scatter_reduce`
# of a tag's prefix: whether a span may go on after it, and whether it goes on with a span
PREFIXES = {"B": (True, False), "I": (True, True), "E": (False, True), "S": (False, False)}
OUTSIDE = -1  # the entity type of O


def token_events(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
) -> Events:
    """The top label of every token that is not padding.

    Args:
        probs (`torch.Tensor` of shape `(B, T, C)`, floating, rows sum to 1): probabilities. Rows that are left out may
            hold anything.
        labels (`torch.Tensor` of shape `(B, T)`, integer in `[0, C)`): tokens equal to `ignore_index` are left out.
        attention_mask (`None` or `torch.Tensor` of shape `(B, T)` in {0, 1}): tokens with 0 are left out.
        shift (`bool`): for causal language models, whose position `t` predicts label `t + 1`. Give the mask of batches
            that are padded on the left: only it tells that nothing predicts their first token.
        ignore_index (`int`): the label that marks what is left out.
    Returns:
        confidence `(M,)`, dtype of `probs`, and correct `(M,)`, int64; empty where no token is kept.
    Raises:
        ValueError: shapes disagree, a row does not sum to 1 within the dtype's tolerance, a label is out of range, or
            a mask holds something other than 0 and 1.
    Source:
        Guo et al. 2017 (arXiv 1706.04599), section 2, with the tokens as rows.
    Example:
        >>> import torch
        >>> probs = torch.tensor([[[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]]])
        >>> token_events(probs, torch.tensor([[0, 1, -100]]))
        (tensor([0.7500, 0.5000]), tensor([1, 0]))
    """
    _check_tokens(probs, labels)
    labels, kept = labels.long(), torch.ones_like(labels, dtype=torch.bool)
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask, labels.shape)
        kept = attention_mask != 0
        other = attention_mask[kept & (attention_mask != 1)]
        if len(other) > 0:  # such as a mask of 0 and -inf, which means the opposite
            raise ValueError(f"attention_mask: got {other[0].item()}; allowed are 0 and 1")
    if shift:
        labels, kept = labels.roll(-1, 1), kept & kept.roll(-1, 1)
        kept[:, -1:] = False  # nothing follows the last token
    confidence, correct, _ = _top_labels(probs, labels.masked_fill(~kept, ignore_index), ignore_index)
    return confidence, correct


def entity_events(
    probs: torch.Tensor,
    labels: torch.Tensor,
    label_names: Sequence[str],
    *,
    aggregate: str = "product",
    ignore_index: int = -100,
) -> Events:
    """Every entity that a tagger predicts, which is right when a true one has its type and its boundaries.

    Spans are read as seqeval does by default, after the script of CoNLL-2000: B- and S- start one; I- and E- go on
    with the span of the same type before them and otherwise start one. Plain IO tags are the case without B-. True
    entities that were not predicted are no events: what was missed is a matter of recall, not of calibration.

    Args:
        probs (`torch.Tensor` of shape `(B, T, C)`, floating, rows sum to 1): probabilities of the tags.
        labels (`torch.Tensor` of shape `(B, T)`, integer in `[0, C)`): true tags. Tokens equal to `ignore_index`, as
            the later parts of words are, are left out before spans are read.
        label_names (sequence of `C` `str`): `"O"`, or a type after `"B-"`, `"I-"`, `"E-"` or `"S-"`.
        aggregate (`"product"`, `"mean"` or `"min"`): of the probabilities of a span's predicted tags; `"mean"` is the
            arithmetic one, as in the token-classification pipeline.
        ignore_index (`int`): the label that marks what is left out.
    Returns:
        confidence `(M,)`, dtype of `probs` but at least float32, and correct `(M,)`, int64, in order of the text;
        empty where no entity is predicted.
    Raises:
        ValueError: as `token_events`; or a name is no tag, or there are not `C` of them.
    Source:
        Tjong Kim Sang & Buchholz 2000, "Introduction to the CoNLL-2000 shared task: chunking".
    Example:
        >>> import torch
        >>> probs = torch.tensor([[[0.0, 0.75, 0.25], [0.5, 0.0, 0.5], [0.25, 0.25, 0.5]]])  # B-PER O I-PER
        >>> entity_events(probs, torch.tensor([[1, 0, 0]]), ["O", "B-PER", "I-PER"])
        (tensor([0.7500, 0.5000]), tensor([1, 0]))
    """
    check_choice("aggregate", aggregate, tuple(REDUCTIONS))
    _check_tokens(probs, labels)
    tags = _tag_table(label_names, probs.shape[-1]).to(probs.device)
    rows, gold, sequence = _kept_tokens(probs, labels, ignore_index)
    confidence, predicted = rows.max(-1)
    first, last = _spans(tags[:, predicted], sequence)
    true_first, true_last = _spans(tags[:, gold], sequence)
    true_end = torch.full_like(gold, -1)  # where the true span ends that starts here
    true_end[true_first] = true_last
    types, true_types = tags[2, predicted], tags[2, gold]
    correct = (true_end[first] == last) & (true_types[first] == types[first])
    span = torch.arange(len(first), device=probs.device).repeat_interleave(last - first + 1)
    inside = confidence[types != OUTSIDE]
    return _aggregate(inside.double(), span, len(first), aggregate).to(_wide(probs)), correct.long()


def span_events(
    start_probs: torch.Tensor,
    end_probs: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
    *,
    max_length: int | None = None,
    ignore_index: int = -100,
) -> Events:
    r"""The best answer of extractive question answering, which is right when both of its ends are.

    $$\mathrm{conf} = \frac{\max_{s \le e} p_s q_e}{\sum_{s \le e} p_s q_e}$$

    The two ends are chosen independently of each other, so only the spans that may be answers are counted. That a
    question has no answer is the span from 0 to 0, as in SQuAD 2. Tokens that may not be in an answer (the question,
    padding) have to be masked before the softmax, as the question-answering pipeline does.

    Args:
        start_probs (`torch.Tensor` of shape `(B, T)`, floating, rows sum to 1): where the answer starts.
        end_probs (`torch.Tensor` of shape `(B, T)`, floating, rows sum to 1): its last token.
        start_positions (`torch.Tensor` of shape `(B,)`, integer in `[0, T)`).
        end_positions (`torch.Tensor` of shape `(B,)`, integer in `[0, T)`).
        max_length (`None` or `int`): the most tokens that an answer may have. A longer true answer is still an event,
            which no prediction gets right.
        ignore_index (`int`): a row with this as either position is left out.
    Returns:
        confidence `(M,)`, dtype of `start_probs` but at least float32, and correct `(M,)`, int64; empty where every
        row is left out. Of equally good spans the first is taken; where no span has any probability, the confidence
        is 0.
    Raises:
        ValueError: as `token_events`, or `max_length` is not a positive integer.
    Source:
        The best span is that of Devlin et al. 2019 (arXiv 1810.04805), section 4.2; the normalisation is ours.
    Example:
        >>> import torch
        >>> start, end = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.25, 0.75]])
        >>> span_events(start, end, torch.tensor([1]), torch.tensor([1]))  # 9 / (1 + 3 + 9)
        (tensor([0.6923]), tensor([1]))
    """
    _check_tensor("start_probs", start_probs, ("B", "T"), floating=True)
    _check_tensor("end_probs", end_probs, start_probs.shape, floating=True)
    _check_tensor("start_positions", start_positions, start_probs.shape[:1], floating=False)
    _check_tensor("end_positions", end_positions, start_probs.shape[:1], floating=False)
    if max_length is not None:
        check_count("max_length", max_length)
    starts, ends = start_positions.long(), end_positions.long()
    kept = (starts != ignore_index) & (ends != ignore_index)
    if not kept.any():
        return start_probs.new_empty(0, dtype=_wide(start_probs)), starts[:0]
    start_rows, starts = _check_positions("start", start_probs[kept], starts[kept])
    end_rows, ends = _check_positions("end", end_probs[kept], ends[kept])
    best_start, best_end, confidence = _best_spans(start_rows.double(), end_rows.double(), max_length)
    correct = (best_start == starts) & (best_end == ends)
    return confidence.to(_wide(start_probs)), correct.long()


def sequence_events(
    probs: torch.Tensor, labels: torch.Tensor, *, aggregate: str = "product", ignore_index: int = -100
) -> Events:
    """Every sequence as a whole, which is right when the top labels of all its tokens are.

    Args:
        probs (`torch.Tensor` of shape `(B, T, C)`, floating, rows sum to 1): probabilities.
        labels (`torch.Tensor` of shape `(B, T)`, integer in `[0, C)`): tokens equal to `ignore_index` are left out,
            and so are sequences without any other.
        aggregate (`"product"` or `"mean"`): of the probabilities of the top labels; `"mean"` is that of their
            logarithms, so the geometric one. The product is the probability of the whole if tokens are independent;
            the mean does not fall with the length, but it is no probability that the whole is right.
        ignore_index (`int`): the label that marks what is left out.
    Returns:
        confidence `(M,)`, dtype of `probs` but at least float32, and correct `(M,)`, int64; empty where no token is
        kept.
    Raises:
        ValueError: as `token_events`.
    Example:
        >>> import torch
        >>> probs = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]])
        >>> sequence_events(probs, torch.tensor([[0, 2]]))
        (tensor([0.3750]), tensor([1]))
    """
    check_choice("aggregate", aggregate, ("product", "mean"))
    _check_tokens(probs, labels)
    confidence, correct, sequence = _top_labels(probs, labels, ignore_index)
    kept, sequence = sequence.unique_consecutive(return_inverse=True)
    confidence, correct = confidence.double(), _aggregate(correct, sequence, len(kept), "min")
    if aggregate == "mean":
        return _aggregate(confidence.log(), sequence, len(kept), "mean").exp().to(_wide(probs)), correct
    return _aggregate(confidence, sequence, len(kept), "product").to(_wide(probs)), correct


def inference_events(
    confidence: torch.Tensor,
    tokens: torch.Tensor,
    references: torch.Tensor,
    *,
    pad_token_id: int | None = None,
    ignore_index: int = -100,
) -> Events:
    """Every generated token, which is right when a shortest edit of the output into the reference keeps it.

    Tokens are inserted, deleted and replaced at cost 1 each. Where several edits are shortest, the alignment is read
    from the end, and pairs tokens before it inserts, and inserts before it deletes.

    Args:
        confidence (`torch.Tensor` of shape `(B, T)`, floating in `[0, 1]`): probability of each generated token.
        tokens (`torch.Tensor` of shape `(B, T)`, integer): what was generated.
        references (`torch.Tensor` of shape `(B, S)`, integer): what should have been. A row without any token has no
            reference and is left out.
        pad_token_id (`None` or `int`): tokens equal to it are left out on both sides. Where it is the end token too,
            the end of the sequence is not judged.
        ignore_index (`int`): tokens equal to it are left out on both sides too.
    Returns:
        confidence `(M,)`, dtype of `confidence`, and correct `(M,)`, int64; empty where no token is kept.
    Raises:
        ValueError: shapes or dtypes are others, or a confidence is outside `[0, 1]`.
    Source:
        The inference ECE of Wang et al. 2020 (arXiv 2005.00963), section 3. There the alignment is that of TER, which
        may also move blocks, so a token in the wrong place can be right; and the authors' script counts the token
        after a missing one as wrong.
    Example:
        >>> import torch
        >>> confidence = torch.tensor([[0.5, 0.75, 0.25, 1.0]])
        >>> inference_events(confidence, torch.tensor([[5, 9, 6, 7]]), torch.tensor([[5, 6, 8]]))
        (tensor([0.5000, 0.7500, 0.2500, 1.0000]), tensor([1, 0, 1, 0]))
    """
    _check_tensor("confidence", confidence, ("B", "T"), floating=True)
    _check_tensor("tokens", tokens, confidence.shape, floating=False)
    _check_tensor("references", references, (len(tokens), "S"), floating=False)
    tokens, references = tokens.long(), references.long()
    kept, expected = tokens != ignore_index, references != ignore_index
    if pad_token_id is not None:
        kept, expected = kept & (tokens != pad_token_id), expected & (references != pad_token_id)
    kept &= expected.any(1, keepdim=True)
    if not kept.any():
        return confidence.detach()[kept], tokens[kept]
    rows = max(1, BLOCK_ELEMENTS // ((tokens.shape[1] + 1) * (references.shape[1] + 1)))
    blocks = zip(*(column.split(rows) for column in (tokens, references, kept, expected)), strict=True)
    correct = torch.cat([kept_tokens(*block) for block in blocks])
    return check_probs(confidence[kept], correct[kept].long(), name="confidence")


def weighted_calibration_error(
    probs: torch.Tensor, labels: torch.Tensor, *, num_bins: int = 15, ignore_index: int = -100
) -> torch.Tensor:
    r"""Calibration error of the whole distribution over tokens, each class counted by its own probability.

    $$\frac{1}{L} \sum_b \Bigl\lvert \sum_{(i, y) : p_i(y) \in b} p_i(y)\,([y_i = y] - p_i(y)) \Bigr\rvert$$

    Decoders look at more than the top token, and the top-label error says nothing about the others; a plain mean over
    classes would be drowned by a vocabulary of zeros.

    Args:
        probs (`torch.Tensor` of shape `(..., C)`, floating, rows sum to 1): probabilities of the next token.
        labels (`torch.Tensor` of shape `(...)`, integer in `[0, C)`): the tokens.
        num_bins (`int`): bins `(low, high]` of equal width.
        ignore_index (`int`): tokens with this label are left out.
    Returns:
        `torch.Tensor` of shape `()`, float64, in `[0, 1]`: a fraction, lower is better.
    Raises:
        ValueError: as `expected_calibration_error`; or `probs` are not rows of class probabilities.
    Source:
        Kumar & Sarawagi 2019 (arXiv 1903.00802), section 3, weighted ECE. `L` is the sum of all probabilities, which
        is the number of tokens but for the rounding of the rows.
    Example:
        >>> import torch
        >>> weighted_calibration_error(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))  # |0.75/4| + |-0.25/4|
        tensor(0.2500, dtype=torch.float64)
    """
    rows, labels = check_probs(probs, labels, ignore_index=ignore_index)
    if rows.dim() != 2:
        raise ValueError(f"probs: got shape {tuple(probs.shape)}; allowed are (..., C) class probabilities")
    return binned_error(weighted_bin_sums(rows, labels, num_bins))


def weighted_bin_sums(probs: torch.Tensor, labels: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Sums over every class of every row by the bin of its probability, which is its weight too.

    Args:
        probs (`torch.Tensor` of shape `(N, C)`, floating) and labels (`(N,)`, int64): as `check_probs` returns them.
        num_bins (`int`): at least 1.
    Returns:
        `torch.Tensor` of shape `(3, num_bins)`, float64: weights `p`, weighted confidence `p * p`, and weighted
        outcomes `p * [y is the label]`; `binned_error` is what they mean.
    """
    edges = interior_edges(probs[:, :1], num_bins, "width")
    sums = torch.zeros(3, num_bins, dtype=torch.float64, device=probs.device)
    for block in probs.split(max(1, BLOCK_ELEMENTS // probs.shape[1])):
        # a row has fewer than num_bins classes above the first bin, so only these few are looked up
        above = block > (edges[0, 0] if num_bins > 1 else 1)
        high, rest = block[above], block.masked_fill(above, 0)
        sums[:2] += _power_sums(high, edges)
        sums[0, 0] += rest.sum(dtype=torch.float64)
        sums[1, 0] += torch.linalg.vector_norm(rest, dtype=torch.float64).square()
    sums[2] = _power_sums(probs.gather(-1, labels[:, None])[:, 0], edges)[0]
    return sums


def _power_sums(scores: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Sums of `(M,)` scores and of their squares in each bin: `(2, num_bins)` float64."""
    bins, scores = bin_numbers(scores[:, None], edges)[:, 0], scores.double()
    return torch.stack([torch.bincount(bins, scores**power, minlength=edges.shape[1] + 1) for power in (1, 2)])


def _check_tensor(name: str, value: object, shape: Sequence[int | str], *, floating: bool | None = None) -> None:
    """A letter in `shape` stands for any size; `floating` is `None` where any dtype will do."""
    kind = {None: "", True: "floating ", False: "integer "}[floating]
    if not isinstance(value, torch.Tensor) or (floating is not None and value.is_floating_point() != floating):
        raise ValueError(f"{name}: got {describe(value)}; allowed are {kind}torch tensors")
    fits = all(isinstance(size, str) or size == got for size, got in zip(shape, value.shape, strict=False))
    if value.dim() != len(shape) or not fits:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; allowed is ({', '.join(map(str, shape))})")


def _check_tokens(probs: torch.Tensor, labels: torch.Tensor) -> None:
    _check_tensor("probs", probs, ("B", "T", "C"), floating=True)
    _check_tensor("labels", labels, probs.shape[:2], floating=False)


def _check_positions(name: str, probs: torch.Tensor, positions: torch.Tensor) -> Events:
    """`check_probs` with a word about which of the two ends it is."""
    num_positions = probs.shape[1]
    wrong = positions[(positions < 0) | (positions >= num_positions)]
    if len(wrong) > 0:
        raise ValueError(f"{name}_positions: got {int(wrong[0])}; allowed are 0 to {num_positions - 1}")
    return check_probs(probs, positions, name=f"{name}_probs")


def _kept_tokens(
    probs: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `(M, C)` and labels `(M,)` of the tokens that are kept, and the sequence `(M,)` that each is of."""
    labels = labels.long()
    sequence = (labels != ignore_index).nonzero()[:, 0]
    if len(sequence) == 0:
        return probs.new_empty(0, probs.shape[-1]), labels.new_empty(0), sequence
    return *check_probs(probs, labels, ignore_index=ignore_index), sequence


def _top_labels(
    probs: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Confidence, correctness and sequence of every kept token, `(M,)` each."""
    rows, labels, sequence = _kept_tokens(probs, labels, ignore_index)
    confidence, correct = checked_events(rows, labels)
    return confidence[:, 0], correct[:, 0].long(), sequence


def _wide(probs: torch.Tensor) -> torch.dtype:
    """What holds a product of probabilities: eight bits would not."""
    return torch.promote_types(probs.dtype, torch.float32)


def _aggregate(values: torch.Tensor, groups: torch.Tensor, num_groups: int, how: str) -> torch.Tensor:
    """`(M,)` values and the group of each, in `[0, num_groups)`, give `(num_groups,)` values."""
    return values.new_zeros(num_groups).scatter_reduce_(0, groups, values, REDUCTIONS[how], include_self=False)


def _tag_table(label_names: Sequence[str], num_labels: int) -> torch.Tensor:
    """`(3, C)` int64: whether a span may go on after the tag, whether the tag goes on with one, and the type."""
    if len(label_names) != num_labels:
        raise ValueError(
            f"label_names: got {len(label_names)} of them; allowed is one for each of {num_labels} labels"
        )
    numbers: dict[str, int] = {}
    columns = []
    for name in label_names:
        prefix, _, kind = str(name).partition("-")
        if name != "O" and not (prefix in PREFIXES and kind):
            raise ValueError(f"label_names: got {name!r}; allowed are 'O', and 'B-', 'I-', 'E-' or 'S-' before a type")
        number = OUTSIDE if name == "O" else numbers.setdefault(kind, len(numbers))
        columns.append((*PREFIXES.get(prefix, (False, False)), number))
    return torch.tensor(columns, dtype=torch.int64).reshape(-1, 3).T


def _spans(tags: torch.Tensor, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last token of every span, `(S,)` each, of `(3, M)` columns of the tag table."""
    open_after, goes_on, types = tags
    pairs = (open_after[:-1] * goes_on[1:] == 1) & (types[:-1] == types[1:]) & (sequence[:-1] == sequence[1:])
    inside = types != OUTSIDE
    # no tag goes on from before the first token, nor after the last
    first, last = inside & ~F.pad(pairs, (1, 0))[: len(types)], inside & ~F.pad(pairs, (0, 1))[: len(types)]
    return first.nonzero()[:, 0], last.nonzero()[:, 0]


def _best_spans(
    starts: torch.Tensor, ends: torch.Tensor, max_length: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start, end and share of the most probable span of each row of `(B, T)` float64 probabilities."""
    num_positions = starts.shape[1]
    length = num_positions if max_length is None else min(max_length, num_positions)
    # windows[b, s] are the ends that a span from s may have: a view, so nothing of its size is held
    windows = F.pad(ends, (0, length - 1)).unfold(1, length, 1)
    best, offset = windows.max(-1)
    share, start = (starts * best).max(-1)
    total = (starts * windows.sum(-1)).sum(-1)
    confidence = share / total.clamp_min(torch.finfo(total.dtype).tiny)
    return start, start + offset.gather(1, start[:, None])[:, 0], confidence.clamp_max(1)
