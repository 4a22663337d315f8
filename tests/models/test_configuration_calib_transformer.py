import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from hf_calib.models import CalibTransformerConfig, register


def test_defaults_are_derived_from_the_sizes():
    config = CalibTransformerConfig(hidden_size=128, num_attention_heads=4, dropout=0.2)
    assert config.num_key_value_heads == 4
    assert config.intermediate_size == 384  # 8/3 * 128 = 341.3, the next multiple of 64
    assert config.classifier_dropout == 0.2


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(24, 64), (48, 128), (512, 1408), (768, 2048)])
def test_intermediate_size_is_eight_thirds_rounded_up(hidden_size, intermediate_size):
    assert (
        CalibTransformerConfig(hidden_size=hidden_size, num_attention_heads=4).intermediate_size == intermediate_size
    )


def test_save_and_load_keep_every_field(tmp_path):
    config = CalibTransformerConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        max_position_embeddings=77,
        rope_theta=500.0,
        norm_eps=1e-5,
        dropout=0.3,
        attention_dropout=0.2,
        classifier_dropout=0.0,
        initializer_range=0.1,
        pad_token_id=5,
        bos_token_id=6,
        eos_token_id=7,
        id2label={0: "no", 1: "yes", 2: "perhaps"},
    )
    config.save_pretrained(tmp_path)
    register()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CalibTransformerConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.classifier_dropout == 0.0
    assert loaded.num_labels == 3
    assert loaded.to_dict()["model_type"] == "calib_transformer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, r"num_attention_heads=4 must divide hidden_size=30"),
        (
            {"hidden_size": 36, "num_attention_heads": 4},
            r"hidden_size=36 must be .* a multiple of 2 \* num_attention_heads=8",
        ),  # head_dim 9
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, r"num_key_value_heads=3 must divide .*=8"),
        ({"num_attention_heads": 8, "num_key_value_heads": 16}, r"num_key_value_heads=16 must divide .*=8"),
        ({"vocab_size": 0}, r"vocab_size=0 must be positive"),
        ({"hidden_size": -64}, r"hidden_size=-64 must be positive"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be positive"),
        ({"num_attention_heads": 0}, r"num_attention_heads=0 must be positive"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads=0 must be positive"),
        ({"intermediate_size": 0}, r"intermediate_size=0 must be positive"),
        ({"max_position_embeddings": 0}, r"max_position_embeddings=0 must be positive"),
        ({"rope_theta": 0.0}, r"rope_theta=0.0 must be positive"),
        ({"norm_eps": 0.0}, r"norm_eps=0.0 must be positive"),
        ({"initializer_range": -0.02}, r"initializer_range=-0.02 must be positive"),
        ({"dropout": 1.0}, r"dropout=1.0 must be at least 0 and below 1"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0.1 must be at least 0 and below 1"),
        ({"classifier_dropout": 1.5}, r"classifier_dropout=1.5 must be at least 0 and below 1"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CalibTransformerConfig(**arguments)


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="vocab_size"):
        CalibTransformerConfig(vocab_size="many")


def test_vanilla_is_the_architecture_of_2017_and_names_its_own_arguments():
    config = CalibTransformerConfig.vanilla(vocab_size=11, d_model=64, nhead=4, num_layers=3, dropout=0.2)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 3)
    assert (config.decoder_layers, config.intermediate_size, config.dropout) == (3, 256, 0.2)
    assert (config.norm, config.norm_first, config.position_embedding) == ("layernorm", False, "sinusoidal")
    with pytest.raises(ValueError, match="nhead=5 must divide d_model=64"):
        CalibTransformerConfig.vanilla(vocab_size=11, d_model=64, nhead=5)


@pytest.mark.parametrize("name", ["norm", "position_embedding", "activation"])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name):
    with pytest.raises(ValueError, match=f"{name}='none' must be one of '"):
        CalibTransformerConfig(**{name: "none"})
