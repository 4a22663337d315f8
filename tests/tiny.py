"""A classifier and a tokenizer small enough to be built in memory for every test."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_classifier(names: list[str], vocab_size: int) -> BertForSequenceClassification:
    """A tiny BERT, the same at every call, whose logits differ a lot from row to row."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        initializer_range=0.5,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return BertForSequenceClassification(config).eval()


def make_reader(vocab_size: int) -> BertForQuestionAnswering:
    """A tiny BERT that answers questions, the same at every call."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        initializer_range=0.5,
    )
    return BertForQuestionAnswering(config).eval()


def make_writer(vocab_size: int) -> BartForConditionalGeneration:
    """A tiny Bart that makes texts of texts, the same at every call; it begins with its end token, `[SEP]`."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=vocab_size,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        init_std=0.5,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer: a word, a token. Its vocabulary is `SPECIAL` and then the words."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_sentiment_classifier(folder, num_numbers: int = 4000) -> None:
    """A far too sure classifier of negative and positive, with its tokenizer, that knows words and many numbers."""
    words = ["good", "fine", "great", "bad", "poor", "awful", *map(str, range(num_numbers))]
    model = make_classifier(["negative", "positive"], len(SPECIAL) + len(words))
    with torch.no_grad():
        model.classifier.weight *= 4
    model.save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)


def save_chat_model(folder, num_numbers: int) -> None:
    """A tiny Llama, the same at every call, whose answers depend on the number that it is told; with its tokenizer."""
    torch.manual_seed(0)
    words = ["A", "B", "C", "Yes", "No", *map(str, range(num_numbers))]
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = make_tokenizer(words)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %} [SEP]"
    tokenizer.save_pretrained(folder)


def mostly_predicted(folder, texts: list[str]) -> list[str]:
    """Names of labels that the classifier in the folder gets right in three cases of four."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")).logits
    wrong = torch.rand(len(texts), generator=torch.Generator().manual_seed(0)) < 0.25
    predicted = torch.where(wrong, logits.argsort(-1)[:, -2], logits.argmax(-1))
    return [model.config.id2label[index] for index in predicted.tolist()]
