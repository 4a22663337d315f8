import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_calib import TemperatureScaling

from .loopback_hub import LoopbackHub


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(40))]
NAMES = ["sad", "calm", "glad"]


@pytest.fixture(scope="session")
def loopback_hub():
    """A Hub on 127.0.0.1 for clients in processes of their own. Tests share it: each has repo names of its own."""
    with LoopbackHub() as hub:
        yield hub
    assert hub.outside == [], "a client of the loopback hub tried to reach another host"


@pytest.fixture
def classifier():
    """A tiny BERT with three named labels, whose logits differ a lot from row to row."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        initializer_range=0.5,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    """A tiny fast tokenizer: a word, a token."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def labelled_texts():
    """Thirty texts of one to ten words; the names of their labels come in another order than the classifier's."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 11, (30,), generator=generator).tolist()
    words = [torch.randint(40, (length,), generator=generator).tolist() for length in lengths]
    labels = torch.randint(3, (30,), generator=generator).tolist()
    return datasets.Dataset.from_dict(
        {
            "text": [" ".join(f"w{word}" for word in row) for row in words],
            "other": [f"w{row[0]} w1" for row in words],
            "label": labels,
        },
        features=datasets.Features(
            {
                "text": datasets.Value("string"),
                "other": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["glad", "sad", "calm"]),
            }
        ),
    )


@pytest.fixture
def temperature():
    """A temperature that was fitted on three labels: 2.5."""
    p = torch.tensor([0.8, 0.15, 0.05])
    labels = torch.tensor([0] * 16 + [1] * 3 + [2])
    return TemperatureScaling().fit((2.5 * p.log()).expand(20, 3), labels)


@pytest.fixture
def tokens():
    """Four rows of six tokens, as keyword arguments of a model."""
    ids = torch.randint(4, len(WORDS), (4, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
