"""The numbers and choices that define a CalibTransformer."""

import sys

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "position_embedding": ("rotary", "sinusoidal"),
    "activation": ("swiglu", "relu"),
}


@strict
class CalibTransformerConfig(PreTrainedConfig):
    r"""Sizes and choices of a CalibTransformer: encoder, decoder, or both, from one set of blocks.

    The defaults are those of present-day models: RMSNorm before each block, rotary positions, SwiGLU, no biases.
    `CalibTransformerConfig.vanilla` gives the architecture of 2017.

    Args:
        vocab_size (`int`, defaults to 32000): rows of the token embedding.
        hidden_size (`int`, defaults to 512): width of the residual stream, a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 6): layers of the encoder, or of a decoder that stands alone.
        decoder_layers (`int`, *optional*): layers of the decoder in an encoder-decoder. `None` gives
            `num_hidden_layers`.
        num_attention_heads (`int`, defaults to 8): query heads. Each has `hidden_size / num_attention_heads`
            dimensions, for rotary positions an even number, because they turn pairs of them.
        num_key_value_heads (`int`, *optional*): key and value heads, a divisor of `num_attention_heads`; query heads
            share them in equal groups. `None` gives every query head its own.
        intermediate_size (`int`, *optional*): width inside the feed-forward block. `None` gives four times
            `hidden_size` for ReLU, and for SwiGLU 8/3 of it, rounded up to a multiple of 64: as many weights.
        max_position_embeddings (`int`, defaults to 2048): the longest sequence that the model accepts. No weight has
            this size, so it may be raised.
        norm (`"rmsnorm"` or `"layernorm"`, defaults to `"rmsnorm"`): how the states are normalised.
        norm_first (`bool`, defaults to `True`): whether a block normalises its input or, as in 2017, the sum of its
            input and output.
        position_embedding (`"rotary"` or `"sinusoidal"`, defaults to `"rotary"`): rotary positions turn queries and
            keys; sinusoidal ones are added to the embedding, which is scaled by `sqrt(hidden_size)` first.
        activation (`"swiglu"` or `"relu"`, defaults to `"swiglu"`): what the feed-forward block computes.
        bias (`bool`, defaults to `False`): whether linear layers and LayerNorm have biases.
        rope_theta (`float`, defaults to 10000.0): base of the rotary wavelengths.
        norm_eps (`float`, defaults to 1e-6): added to the mean square or the variance.
        dropout (`float`, defaults to 0.1): rate on the embedding and on what each block adds to the residual stream.
        attention_dropout (`float`, defaults to 0.0): rate on the attention weights.
        classifier_dropout (`float`, *optional*): rate in front of a classification head. `None` gives `dropout`.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        tie_word_embeddings (`bool`, defaults to `True`): whether encoder, decoder and language-model head share one
            embedding matrix.
        use_cache (`bool`, defaults to `True`): whether a decoder returns its keys and values.
        is_encoder_decoder, is_decoder (`bool`, default to `False`): the model classes set them.
        pad_token_id (`int`, *optional*, defaults to 0): the padding token.
        bos_token_id (`int`, *optional*): the token that begins a sequence.
        eos_token_id (`int`, *optional*): the token that ends a sequence.
        decoder_start_token_id (`int`, *optional*): the token that a decoder begins with. `None` gives `bos_token_id`,
            or without one `pad_token_id`.

    Raises:
        ValueError: a size, a rate, a choice or a combination of sizes is not allowed; the message names it.
        huggingface_hub.errors.StrictDataclassFieldValidationError: an argument has the wrong type.

    Example:
        >>> config = CalibTransformerConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> config.num_key_value_heads, config.decoder_layers, config.intermediate_size
        (4, 2, 384)
    """

    model_type = "calib_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    decoder_layers: int | None = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    norm: str = "rmsnorm"
    norm_first: bool = True
    position_embedding: str = "rotary"
    activation: str = "swiglu"
    bias: bool = False
    rope_theta: float | int = 10000.0
    norm_eps: float = 1e-6
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = False
    is_decoder: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    @classmethod
    def vanilla(cls, vocab_size: int, d_model: int = 512, nhead: int = 8, num_layers: int = 6, **kwargs):
        """The Transformer of 2017: LayerNorm after each block, sinusoidal positions, ReLU, biases.

        With the same weights it computes what `torch.nn.Transformer` does: the paper's model and a LayerNorm at the
        end of the encoder and of the decoder.

        Args:
            vocab_size (`int`): rows of the token embedding.
            d_model (`int`, defaults to 512): `hidden_size`.
            nhead (`int`, defaults to 8): `num_attention_heads`, a divisor of `d_model`.
            num_layers (`int`, defaults to 6): `num_hidden_layers` and `decoder_layers`.
            kwargs: more arguments of the configuration, such as `dropout`.

        Returns:
            `CalibTransformerConfig`.

        Raises:
            ValueError: `nhead` does not divide `d_model`, or as the class does.

        Source:
            Vaswani et al. 2017 (arXiv 1706.03762), sections 3.1 to 3.5.

        Example:
            >>> config = CalibTransformerConfig.vanilla(vocab_size=37000, d_model=512, nhead=8, num_layers=6)
            >>> config.intermediate_size, config.norm, config.position_embedding
            (2048, 'layernorm', 'sinusoidal')
        """
        if nhead < 1 or d_model % nhead:
            raise ValueError(f"nhead={nhead} must divide d_model={d_model}.")
        choices = {
            "norm": "layernorm",
            "norm_first": False,
            "norm_eps": 1e-5,
            "position_embedding": "sinusoidal",
            "activation": "relu",
            "bias": True,
        }
        sizes = {"hidden_size": d_model, "num_attention_heads": nhead, "num_hidden_layers": num_layers}
        return cls(vocab_size=vocab_size, **{**sizes, **choices, **kwargs})

    def __post_init__(self, **kwargs):
        self._check_positive("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}.")
        if self.decoder_layers is None:
            self.decoder_layers = self.num_hidden_layers
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            swiglu_size = -(-8 * self.hidden_size // (3 * 64)) * 64
            self.intermediate_size = swiglu_size if self.activation == "swiglu" else 4 * self.hidden_size
        if self.classifier_dropout is None:
            self.classifier_dropout = self.dropout
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id if self.bos_token_id is None else self.bos_token_id
        self._check_positive("decoder_layers", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
        self._check_positive("rope_theta", "norm_eps", "initializer_range")
        self._check_heads()
        for name in ("dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        super().__post_init__(**kwargs)

    def to_dict(self):
        """As `PreTrainedConfig.to_dict`. peft calls it, too, before it looks for the layers that LoRA adapts.

        So this is the moment to tell peft our default: it has no other place for models that it does not know.
        """
        if (constants := sys.modules.get("peft.utils.constants")) is not None:
            defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            defaults.setdefault(self.model_type, ["qkv_proj", "q_proj", "kv_proj"])
        return super().to_dict()

    def _check_positive(self, *names):
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    def _check_heads(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}."
            )
        paired = {"rotary": self.hidden_size // self.num_attention_heads, "sinusoidal": self.hidden_size}
        if paired[self.position_embedding] % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be even and, for rotary positions, a multiple of "
                f"2 * num_attention_heads={2 * self.num_attention_heads}: positions use pairs of dimensions."
            )


__all__ = ["CalibTransformerConfig"]
