"""The CalibTransformer: a present-day Transformer, written to be read from top to bottom.

Letters in the shape comments: B sequences, T tokens, C = `hidden_size`, H query heads, K key and value heads,
D = C / H dimensions per head.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_calib_transformer import CalibTransformerConfig


def rotary_table(positions, head_dim, theta):
    """Cosine and sine of the rotary angles `position * theta ** (-2 i / head_dim)`, i = 0 ... head_dim / 2 - 1.

    Computed where it is used, in float32, so that the model has no buffer to place, cast or initialise.

    Args:
        positions (`torch.Tensor` of shape `(T,)`): token positions.
        head_dim (`int`): dimensions of a head, even.
        theta (`float`): base of the wavelengths.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(T, head_dim / 2)`, float32.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(states, rotary):
    """Turn each pair (i, i + D / 2) of a head's dimensions by the angle of its position (Su et al. 2021, 2104.09864).

    The product of a rotated query and a rotated key depends on their distance only. Absolute positions cancel, so a
    sequence gives the same result wherever its padding is.

    Args:
        states (`torch.Tensor` of shape `(B, heads, T, D)`): queries or keys.
        rotary (`tuple`): what `rotary_table` returns for the T positions.

    Returns:
        `torch.Tensor` of the shape and dtype of `states`.
    """
    cos, sin = (table.to(states.dtype) for table in rotary)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`softmax(Q K^T * scaling + mask) V` in plain torch: the one implementation that returns its weights.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`), key, value (`(B, K, S, D)`): S positions to look at.
        attention_mask (`torch.Tensor` of shape `(B, 1, T, S)`, *optional*): added to the scores.

    Returns:
        `tuple`: the output `(B, T, H, D)` and the weights `(B, H, T, S)`.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class CalibTransformerAttention(nn.Module):
    """Grouped-query attention with rotary positions; one matrix makes queries, keys and values."""

    def __init__(self, config: CalibTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        qkv_size = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, qkv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, rotary, **kwargs):
        batch_size, length, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch_size, length, -1, self.head_dim).transpose(1, 2)
        # (B, H + 2K, T, D): queries and keys lie side by side, so one rotation serves both
        qk, value = qkv.split((self.num_heads + self.num_key_value_heads, self.num_key_value_heads), dim=1)
        query, key = rotate(qk, rotary).split((self.num_heads, self.num_key_value_heads), dim=1)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,  # (B, H, T, D)
            key,  # (B, K, T, D)
            value,  # (B, K, T, D)
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch_size, length, -1)), weights  # (B, T, C), (B, H, T, T) or None


class CalibTransformerFeedForward(nn.Module):
    """SwiGLU, `W_down (silu(W_gate x) * W_up x)` (Shazeer 2020, 2002.05202); one matrix holds W_gate and W_up."""

    def __init__(self, config: CalibTransformerConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class CalibTransformerLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: CalibTransformerConfig, layer_idx: int):
        super().__init__()
        self.self_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = CalibTransformerAttention(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = CalibTransformerFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, attention_mask, rotary, **kwargs):
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, rotary, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class CalibTransformerPreTrainedModel(PreTrainedModel):
    """What all CalibTransformer models share: loading, saving, initial weights and the attention implementations."""

    config: CalibTransformerConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CalibTransformerLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CalibTransformerLayer,
        "attentions": CalibTransformerAttention,
    }


class CalibTransformerEncoderModel(CalibTransformerPreTrainedModel):
    """Tokens in, one vector per token out; every token sees every token that is not padding.

    Args:
        config (`CalibTransformerConfig`): the sizes.
    """

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(config)
        # No padding_idx: the mask keeps padding from all that counts, so its row gets no gradient anyway, and a real
        # token that has the id of pad_token_id is not frozen at zero.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(CalibTransformerLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        r"""Encode a batch of sequences.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for a token, 0 for padding, on any side.
                `None` means that there is no padding.
            inputs_embeds (`torch.Tensor` of shape `(B, T, C)`, *optional*): vectors in place of `input_ids`.
            output_hidden_states, output_attentions (`bool`, *optional*): return what each layer computed. Attention
                weights exist only under `attn_implementation="eager"`.

        Returns:
            `BaseModelOutput`: `last_hidden_state` `(B, T, C)`; on request `hidden_states` (the embedding, then the
            output of each layer, the last one normalised) and `attentions` (one `(B, H, T, T)` per layer).

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, or T exceeds
                `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"The sequences have {length} positions; this model accepts at most "
                f"max_position_embeddings={self.config.max_position_embeddings}. Truncate them."
            )

        mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        positions = torch.arange(length, device=inputs_embeds.device)
        rotary = rotary_table(positions, self.layers[0].self_attn.head_dim, self.config.rope_theta)
        hidden_states = self.dropout(inputs_embeds)  # (B, T, C)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, rotary, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


def mean_over_tokens(hidden_states, attention_mask=None):
    r"""Mean of the token vectors, padding left out: $\sum_t m_t h_t / \sum_t m_t$; zero where all is padding.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, C)`): token vectors.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for a token, 0 for padding.

    Returns:
        `torch.Tensor` of shape `(B, C)`, in the dtype of `hidden_states`.

    Raises:
        ValueError: `attention_mask` has another shape.
    """
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; the mean over tokens needs "
            f"{tuple(hidden_states.shape[:2])}, one entry for each token."
        )
    total = (attention_mask.to(hidden_states.dtype)[:, None, :] @ hidden_states).squeeze(1)  # (B, 1, T) @ (B, T, C)
    return total / attention_mask.sum(dim=1, keepdim=True).clamp(min=1)


def sequence_classification_loss(labels, pooled_logits, config, num_items_in_batch=None, **kwargs):
    """The loss of `config.problem_type`, in float32 at least and exact under gradient accumulation for every type.

    Args:
        labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`): classes (int64), targets or 0/1 flags (floating).
        pooled_logits (`torch.Tensor` of shape `(B, num_labels)`): scores.
        config (`CalibTransformerConfig`): gives `num_labels` and `problem_type`; a missing `problem_type` is set.
        num_items_in_batch (`int` or `torch.Tensor` of shape `()`, *optional*): labels in the whole accumulated batch.

    Returns:
        `torch.Tensor` of shape `()`: the sum over labels divided by `num_items_in_batch`, or the mean without it.
    """
    logits = pooled_logits.to(torch.promote_types(pooled_logits.dtype, torch.float32))
    loss = ForSequenceClassificationLoss(labels, logits, config, num_items_in_batch=num_items_in_batch, **kwargs)
    if num_items_in_batch is not None and config.problem_type != "single_label_classification":
        # transformers divides by num_items_in_batch for classes only; the other two losses come back as a mean
        loss = loss * labels.numel() / torch.as_tensor(num_items_in_batch, device=loss.device)
    return loss


class CalibTransformerForSequenceClassification(CalibTransformerPreTrainedModel):
    """The encoder, a mean over its tokens, and a linear head: one row of logits per sequence.

    Args:
        config (`CalibTransformerConfig`): the sizes; `num_labels` or `id2label` sets the number of logits.
    """

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(config)
        self.encoder = CalibTransformerEncoderModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        # With a bias, so that a calibrator with one (vector, matrix scaling) can be folded into the head
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_function = sequence_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        r"""Score a batch of sequences.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for a token, 0 for padding, on any side.
                `None` means that there is no padding.
            inputs_embeds (`torch.Tensor` of shape `(B, T, C)`, *optional*): vectors in place of `input_ids`.
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*): int64 classes, floating targets
                for regression (`num_labels=1`), or floating 0/1 flags for multi-label; `config.problem_type` decides.
            num_items_in_batch (`int`, *optional*): labels in the whole accumulated batch; the loss is divided by it.

        Returns:
            `SequenceClassifierOutput`: `logits` `(B, num_labels)`, `loss` `()` when there are labels, and on request
            `hidden_states` and `attentions`.

        Raises:
            ValueError: as the encoder does, or `attention_mask` does not have the shape of the tokens.
        """
        outputs = self.encoder(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        pooled = mean_over_tokens(outputs.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "CalibTransformerEncoderModel",
    "CalibTransformerForSequenceClassification",
    "CalibTransformerPreTrainedModel",
]
