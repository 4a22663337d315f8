"""The numbers that define a CalibTransformer."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class CalibTransformerConfig(PreTrainedConfig):
    r"""Sizes and rates of a CalibTransformer: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    Args:
        vocab_size (`int`, defaults to 32000): rows of the token embedding.
        hidden_size (`int`, defaults to 512): width of the residual stream, a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 6): number of layers.
        num_attention_heads (`int`, defaults to 8): query heads. Each has `hidden_size / num_attention_heads`
            dimensions, an even number, because rotary positions turn pairs of them.
        num_key_value_heads (`int`, *optional*): key and value heads, a divisor of `num_attention_heads`; query heads
            share them in equal groups. `None` gives every query head its own.
        intermediate_size (`int`, *optional*): width inside the feed-forward block. `None` gives 8/3 of `hidden_size`,
            rounded up to a multiple of 64: as many weights as the usual ungated block of four times the width.
        max_position_embeddings (`int`, defaults to 2048): the longest sequence that the model accepts. No weight has
            this size, so it may be raised.
        rope_theta (`float`, defaults to 10000.0): base of the rotary wavelengths.
        norm_eps (`float`, defaults to 1e-6): added to the mean square inside RMSNorm.
        dropout (`float`, defaults to 0.1): rate on the embedding and on what each block adds to the residual stream.
        attention_dropout (`float`, defaults to 0.0): rate on the attention weights.
        classifier_dropout (`float`, *optional*): rate in front of a classification head. `None` gives `dropout`.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        pad_token_id (`int`, *optional*, defaults to 0): the padding token.
        bos_token_id (`int`, *optional*): the token that begins a sequence.
        eos_token_id (`int`, *optional*): the token that ends a sequence.

    Raises:
        ValueError: a size, a rate or a combination of sizes is not allowed; the message names it.
        huggingface_hub.errors.StrictDataclassFieldValidationError: an argument has the wrong type.

    Example:
        >>> config = CalibTransformerConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> config.num_key_value_heads, config.intermediate_size
        (4, 384)
    """

    model_type = "calib_transformer"

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float | int = 10000.0
    norm_eps: float = 1e-6
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self._check_positive("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.classifier_dropout is None:
            self.classifier_dropout = self.dropout
        self._check_positive("num_key_value_heads", "intermediate_size", "max_position_embeddings")
        self._check_positive("rope_theta", "norm_eps", "initializer_range")
        self._check_heads()
        for name in ("dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        super().__post_init__(**kwargs)

    def _check_positive(self, *names):
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    def _check_heads(self):
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_attention_heads="
                f"{2 * self.num_attention_heads}, so that every head has the same, even number of dimensions."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}."
            )


__all__ = ["CalibTransformerConfig"]
