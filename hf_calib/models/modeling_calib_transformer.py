"""The CalibTransformer: a present-day Transformer, and that of 2017, written to be read from top to bottom.

A `CalibTransformerLayer` is self-attention, cross-attention where there is an encoder to look at, and a feed-forward
block. A stack of layers is an encoder (`CalibTransformerEncoderModel`) or a decoder (`CalibTransformerDecoderModel`);
`CalibTransformerModel` is both. What is called `...For...` is one of the three and a head on its last states.

Letters in the shape comments: B sequences, T tokens, S tokens that are looked at, C = `hidden_size`, H query heads,
K key and value heads, D = C / H dimensions per head, V = `vocab_size`.
"""

import copy

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_calib_transformer import CalibTransformerConfig


# --- positions


def rotary_table(positions, head_dim, theta, dtype=torch.float32):
    """Cosine and sine of the rotary angles `position * theta ** (-2 i / head_dim)`, i = 0 ... head_dim / 2 - 1.

    Computed where it is used, in float32, so that the model has no buffer to place, cast or initialise.

    Args:
        positions (`torch.Tensor` of shape `(B or 1, T)`): token positions.
        head_dim (`int`): dimensions of a head, D, even.
        theta (`float`): base of the wavelengths.
        dtype (`torch.dtype`): of the result.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B or 1, 1, T, D)`: cosines, and sines with the sign that `rotate`
        needs. Both halves of D have the same angles.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


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
    cos, sin = rotary
    return states * cos + states.roll(states.shape[-1] // 2, dims=-1) * sin  # rolled: each number's partner


def sinusoidal_table(positions, hidden_size, dtype=torch.float32):
    """Sine and cosine of `position / 10000 ** (2 i / hidden_size)`, side by side (Vaswani et al. 2017, section 3.5).

    Args:
        positions (`torch.Tensor` of shape `(B or 1, T)`): token positions.
        hidden_size (`int`): C, even.
        dtype (`torch.dtype`): of the result.

    Returns:
        `torch.Tensor` of shape `(B or 1, T, C)`.
    """
    exponents = torch.arange(0, hidden_size, 2, device=positions.device, dtype=torch.float32) / hidden_size
    angles = positions[..., None].float() * 10000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


# --- what is fast on a CPU, too


def is_plain_cpu(states, weight):
    """Whether both lie on a CPU in float32 and nothing is being compiled: where torch itself leaves time lying."""
    return not is_compiling() and states.is_cpu and states.dtype == weight.dtype == torch.float32


class CalibTransformerLinear(nn.Linear):
    """`nn.Linear`; on a CPU and without gradients, few rows (a step of generation) are multiplied another way.

    One thread does the product of a few rows with a large matrix, and slowly. So the matrix is cut into blocks, which
    are multiplied in parallel: in float32 on two cores 2 to 4 times as fast for 1 row, 1.5 to 2 times for 8.
    """

    max_rows, num_blocks, min_columns = 16, 8, 512  # as measured

    def forward(self, states):
        weight, bias, num_blocks = self.weight, self.bias, self.num_blocks
        if torch.is_grad_enabled() or not is_plain_cpu(states, weight) or self.out_features % num_blocks:
            return super().forward(states)
        rows = states.numel() // self.in_features
        if rows > self.max_rows:
            return super().forward(states)
        shape = (*states.shape[:-1], self.out_features)
        states, blocks = states.reshape(rows, self.in_features), weight.view(num_blocks, -1, self.in_features)
        if self.in_features < self.min_columns:
            output = torch.bmm(blocks, states.t().expand(num_blocks, -1, -1))
            output = output.view(self.out_features, rows).t().contiguous()
        else:
            output = torch.bmm(states.expand(num_blocks, -1, -1), blocks.transpose(1, 2)).transpose(0, 1)
        output = output.reshape(shape)
        return output if bias is None else output.add_(bias)


def inverse_rms(states, eps):
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return norm.square().div_(states.shape[-1]).add_(eps).rsqrt_()


class RMSNormFunction(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight` with a gradient of few operations."""

    @staticmethod
    def forward(ctx, states, weight, eps):
        ctx.save_for_backward(states, weight)
        ctx.eps = eps
        return states * inverse_rms(states, eps) * weight

    @staticmethod
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        scale = inverse_rms(states, ctx.eps)  # anew and not saved, so that it can be differentiated again
        normed = states * scale
        product = grad * normed
        along = (product @ weight / -states.shape[-1])[..., None]  # what would change the norm
        return (grad * weight).addcmul_(normed, along).mul_(scale), product.flatten(0, -2).sum(0), None


class CalibTransformerRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, `x / sqrt(mean(x^2) + eps) * weight`; on a CPU, where torch has no kernel, in fewer steps."""

    def forward(self, states):
        if not is_plain_cpu(states, self.weight):
            return super().forward(states)
        if torch.is_grad_enabled():
            return RMSNormFunction.apply(states, self.weight, self.eps)
        return (states * inverse_rms(states, self.eps)).mul_(self.weight)


class SwiGLUFunction(torch.autograd.Function):
    """`silu(gate) * up` of the two halves of the last dimension; backward keeps these halves and nothing else."""

    @staticmethod
    def forward(ctx, states):
        ctx.save_for_backward(states)
        gate, up = states.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (states,) = ctx.saved_tensors
        gate, up = states.chunk(2, dim=-1)
        if torch.is_grad_enabled():  # for a second derivative
            sigmoid = gate.sigmoid()
            return torch.cat((grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid), dim=-1)
        gradient = torch.empty_like(states)
        of_gate, of_up = gradient.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=of_up)
        of_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return gradient


class CrossEntropySum(torch.autograd.Function):
    """Sum of `logsumexp(z) - z_y` over rows, block by block: the vocabulary's size times the rows, in cache.

    torch keeps log-probabilities of the size of the logits, and fills a second array with zeros for the gradient.
    """

    block_size = 64

    @staticmethod
    def forward(ctx, logits, labels, ignore_index):
        kept = labels != ignore_index
        labels = labels.masked_fill(~kept, 0)[:, None]
        ctx.save_for_backward(logits, labels, kept)
        blocks = zip(logits.split(CrossEntropySum.block_size), labels.split(CrossEntropySum.block_size), strict=True)
        losses = torch.cat([rows.log_softmax(-1).gather(1, columns) for rows, columns in blocks])
        return -losses[:, 0].masked_fill(~kept, 0).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, labels, kept = ctx.saved_tensors
        scale = (grad * kept)[:, None]
        if torch.is_grad_enabled():  # for a second derivative
            return (logits.softmax(-1) - torch.zeros_like(logits).scatter_(1, labels, 1)) * scale, None, None
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), CrossEntropySum.block_size):
            rows = slice(start, start + CrossEntropySum.block_size)
            torch.softmax(logits[rows], -1, out=gradient[rows])
            gradient[rows].scatter_add_(1, labels[rows], -torch.ones_like(scale[rows])).mul_(scale[rows])
        return gradient, None, None


class CalibTransformerCacheLayer(DynamicLayer):
    """transformers' growing cache, with room: a new token is written where it belongs, and not all copied for it."""

    def __init__(self):
        super().__init__()
        self.rooms = {}

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.is_grad_enabled() or is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self.append("keys", self.keys, key_states, length)
        self.values = self.append("values", self.values, value_states, length)
        return self.keys, self.values

    def append(self, name, old, new, length):
        """`old` `(B, K, length, D)` and then `new`, written behind it if `old` lies in a room that is large enough."""
        total = length + new.shape[-2]
        room = self.rooms.get(name)
        # Beam search and others replace the tensor: then the room is not where it lies
        if room is None or room.data_ptr() != old.data_ptr() or len(room) != len(new) or room.shape[-2] < total:
            room = new.new_empty(*new.shape[:2], total + max(total // 2, 64), new.shape[-1])
            if length:
                room[:, :, :length] = old
            self.rooms[name] = room
        room[:, :, length:total] = new
        return room[:, :, :total]


# --- attention


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
    """What self- and cross-attention share: the heads, and how queries look at keys and values."""

    def __init__(self, config: CalibTransformerConfig, layer_idx: int, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.attention_dropout = config.attention_dropout
        self.o_proj = CalibTransformerLinear(config.hidden_size, config.hidden_size, bias=config.bias)

    def split_heads(self, states):
        return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, heads, T, D)

    def attend(self, query, key, value, attention_mask, **kwargs):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,  # (B, H, T, D)
            key,  # (B, K, S, D)
            value,  # (B, K, S, D)
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights  # (B, T, C), (B, H, T, S) or None


class CalibTransformerSelfAttention(CalibTransformerAttention):
    """Grouped-query attention among the tokens of a sequence; one matrix makes queries, keys and values."""

    def __init__(self, config: CalibTransformerConfig, layer_idx: int, is_causal: bool = False):
        super().__init__(config, layer_idx, is_causal)
        qkv_size = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.qkv_proj = CalibTransformerLinear(config.hidden_size, qkv_size, bias=config.bias)

    def forward(self, hidden_states, attention_mask, rotary=None, cache=None, **kwargs):
        heads = self.split_heads(self.qkv_proj(hidden_states))
        # (B, H + 2K, T, D): queries and keys lie side by side, so one rotation serves both
        qk, value = heads.split((self.num_heads + self.num_key_value_heads, self.num_key_value_heads), dim=1)
        if rotary is not None:
            qk = rotate(qk, rotary)
        query, key = qk.split((self.num_heads, self.num_key_value_heads), dim=1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # T grows to S, all positions so far
        return self.attend(query, key, value, attention_mask, **kwargs)


class CalibTransformerCrossAttention(CalibTransformerAttention):
    """The decoder's tokens look at the encoder's states, whose keys and values are computed once and then cached."""

    def __init__(self, config: CalibTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_proj = CalibTransformerLinear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.kv_proj = CalibTransformerLinear(
            config.hidden_size, 2 * self.num_key_value_heads * self.head_dim, bias=config.bias
        )

    def forward(self, hidden_states, encoder_hidden_states, attention_mask, past_key_values=None, **kwargs):
        query = self.split_heads(self.q_proj(hidden_states))
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            cached = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key, value = cached.keys, cached.values
        else:
            key, value = self.split_heads(self.kv_proj(encoder_hidden_states)).chunk(2, dim=1)
            if past_key_values is not None:
                key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        return self.attend(query, key, value, attention_mask, **kwargs)


# --- layers


class CalibTransformerFeedForward(nn.Module):
    """SwiGLU, `W_down (silu(W_gate x) * W_up x)` (Shazeer 2020, 2002.05202), or `W_down relu(W_up x)`.

    One matrix holds W_gate and W_up.
    """

    def __init__(self, config: CalibTransformerConfig):
        super().__init__()
        self.gated = config.activation == "swiglu"
        up_size = config.intermediate_size * (2 if self.gated else 1)
        self.up_proj = CalibTransformerLinear(config.hidden_size, up_size, bias=config.bias)
        self.down_proj = CalibTransformerLinear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden_states):
        states = self.up_proj(hidden_states)
        if self.gated and torch.is_grad_enabled() and is_plain_cpu(states, states):
            return self.down_proj(SwiGLUFunction.apply(states))
        if self.gated:
            gate, up = states.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.relu(states))


def make_norm(config):
    if config.norm == "rmsnorm":
        return CalibTransformerRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


class CalibTransformerLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention in the decoder of an encoder-decoder, feed-forward: each added to its input."""

    def __init__(
        self, config: CalibTransformerConfig, layer_idx: int, is_causal: bool = False, has_cross: bool = False
    ):
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = config.dropout
        self.self_attn_norm = make_norm(config)
        self.self_attn = CalibTransformerSelfAttention(config, layer_idx, is_causal)
        if has_cross:
            self.cross_attn_norm = make_norm(config)
            self.cross_attn = CalibTransformerCrossAttention(config, layer_idx)
        self.mlp_norm = make_norm(config)
        self.mlp = CalibTransformerFeedForward(config)

    def add(self, states, norm, block):
        """`x + block(norm(x))`, or with the norm last, `norm(x + block(x))`."""
        if self.norm_first:
            return states + F.dropout(block(norm(states)), self.dropout, self.training)
        return norm(states + F.dropout(block(states), self.dropout, self.training))

    def forward(
        self,
        states,
        attention_mask,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        rotary=None,
        past_key_values=None,
        position_ids=None,
        **kwargs,
    ):
        cross = encoder_hidden_states is not None
        cache = past_key_values.self_attention_cache if cross and past_key_values is not None else past_key_values
        states = self.add(
            states,
            self.self_attn_norm,
            lambda x: self.self_attn(x, attention_mask, rotary, cache, position_ids=position_ids, **kwargs)[0],
        )
        if cross:
            states = self.add(
                states,
                self.cross_attn_norm,
                lambda x: self.cross_attn(x, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs)[
                    0
                ],
            )
        return self.add(states, self.mlp_norm, self.mlp)


# --- models


class CalibTransformerPreTrainedModel(PreTrainedModel):
    """What all CalibTransformer models share: loading, saving, initial weights and the attention implementations."""

    config: CalibTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CalibTransformerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class CalibTransformerStack(CalibTransformerPreTrainedModel):
    """What encoder and decoder share: tokens are embedded and located, pass through the layers, and are normalised."""

    def __init__(self, config: CalibTransformerConfig, num_layers: int, **layer_options):
        super().__init__(config)
        # No padding_idx: the mask keeps padding from all that counts, so its row gets no gradient anyway, and a real
        # token that has the id of pad_token_id is not frozen at zero.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(CalibTransformerLayer(config, i, **layer_options) for i in range(num_layers))
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids, inputs_embeds, attention_mask, past_length=0):
        """The embedding `(B, T, C)` of the tokens, or the vectors in place of it; refuses shapes that do not fit."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        total = past_length + embeds.shape[1]
        if isinstance(total, torch.Tensor):  # a static cache counts on the device, where nothing is read
            return embeds
        if total > self.config.max_position_embeddings:
            raise ValueError(
                f"The sequences have {total} positions; this model accepts at most "
                f"max_position_embeddings={self.config.max_position_embeddings}. Truncate them."
            )
        check_shape("attention_mask", attention_mask, (embeds.shape[0], total), ndim=2)
        return embeds

    def locate(self, embeds, attention_mask, position_ids, past_length=0):
        """Bring in the positions: the states that enter the first layer, and the rotary tables or None."""
        length, size = embeds.shape[1:]
        sinusoidal = self.config.position_embedding == "sinusoidal"
        if position_ids is None:
            if sinusoidal and attention_mask is not None and attention_mask.ndim == 2:  # padding has no position
                position_ids = (attention_mask.long().cumsum(1)[:, -length:] - 1).clamp(min=0)
            else:
                position_ids = past_length + torch.arange(length, device=embeds.device)[None]
        if sinusoidal:
            return self.dropout(embeds * size**0.5 + sinusoidal_table(position_ids, size, embeds.dtype)), None
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return self.dropout(embeds), rotary_table(position_ids, head_dim, self.config.rope_theta, embeds.dtype)


class CalibTransformerEncoderModel(CalibTransformerStack):
    """Tokens in, one vector per token out; every token sees every token that is not padding.

    Args:
        config (`CalibTransformerConfig`): the sizes; `num_hidden_layers` is the number of layers.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CalibTransformerLayer,
        "attentions": CalibTransformerSelfAttention,
    }

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(config, config.num_hidden_layers)

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, **kwargs):
        r"""Encode a batch of sequences.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for a token, 0 for padding, on any side.
                `None` means that there is no padding.
            inputs_embeds (`torch.Tensor` of shape `(B, T, C)`, *optional*): vectors in place of `input_ids`.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*): positions. `None` counts the tokens.
            output_hidden_states, output_attentions (`bool`, *optional*): return what each layer computed. Attention
                weights exist only under `attn_implementation="eager"`.

        Returns:
            `BaseModelOutput`: `last_hidden_state` `(B, T, C)`; on request `hidden_states` (the embedding, then the
            output of each layer, the last one normalised) and `attentions` (one `(B, H, T, T)` per layer).

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, T exceeds
                `max_position_embeddings`, or `attention_mask` has another shape.
        """
        embeds = self.embed(input_ids, inputs_embeds, attention_mask)
        states, rotary = self.locate(embeds, attention_mask, position_ids)
        mask = create_bidirectional_mask(self.config, embeds, attention_mask)
        for layer in self.layers:
            states = layer(states, mask, rotary=rotary, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(states))


class CalibTransformerDecoderModel(CalibTransformerStack):
    """Tokens in, one vector per token out; every token sees those before it and, in an encoder-decoder, the encoder's.

    Args:
        config (`CalibTransformerConfig`): the sizes. `is_encoder_decoder` says whether there is an encoder to look at;
            then `decoder_layers` is the number of layers, else `num_hidden_layers`.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CalibTransformerLayer,
        "attentions": CalibTransformerSelfAttention,
        "cross_attentions": CalibTransformerCrossAttention,
    }

    def __init__(self, config: CalibTransformerConfig):
        if not config.is_encoder_decoder:
            config = with_flags(config, is_encoder_decoder=False, is_decoder=True)
        num_layers = config.decoder_layers if config.is_encoder_decoder else config.num_hidden_layers
        super().__init__(config, num_layers, is_causal=True, has_cross=config.is_encoder_decoder)

    def new_cache(self):
        if self.config.is_encoder_decoder:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return DynamicCache(config=self.config)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        **kwargs,
    ):
        r"""Run a batch of sequences, or the next tokens of sequences that are in a cache.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens that are not in the
                cache.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for a token, 0 for padding, on any side,
                for the tokens in the cache and then the new ones. `None` means that there is no padding.
            inputs_embeds (`torch.Tensor` of shape `(B, T, C)`, *optional*): vectors in place of `input_ids`.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*): positions. `None` counts the tokens.
            encoder_hidden_states (`torch.Tensor` of shape `(B, S', C)`, *optional*): what the encoder returned.
            encoder_attention_mask (`torch.Tensor` of shape `(B, S')`, *optional*): its padding.
            past_key_values (`Cache`, *optional*): keys and values of the tokens so far; with an encoder an
                `EncoderDecoderCache`.
            use_cache (`bool`, *optional*): whether to make a cache where there is none. `None` takes the config's.
            output_hidden_states, output_attentions (`bool`, *optional*): as in the encoder.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions`: `last_hidden_state` `(B, T, C)`, `past_key_values`, and on
            request `hidden_states`, `attentions` and `cross_attentions`.

        Raises:
            ValueError: as the encoder, or `encoder_hidden_states` are missing, or given where there is no encoder.
        """
        if (encoder_hidden_states is None) == self.config.is_encoder_decoder:
            raise ValueError(
                f"encoder_hidden_states: {'missing' if self.config.is_encoder_decoder else 'given'}, but "
                f"config.is_encoder_decoder={self.config.is_encoder_decoder}."
            )
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        cross = isinstance(past_key_values, EncoderDecoderCache)
        cache = past_key_values.self_attention_cache if cross else past_key_values
        past_length = 0 if cache is None else cache.get_seq_length()
        if isinstance(cache, DynamicCache) and not cache.is_initialized:
            cache.layers = [CalibTransformerCacheLayer() if type(x) is DynamicLayer else x for x in cache.layers]

        embeds = self.embed(input_ids, inputs_embeds, attention_mask, past_length)
        states, rotary = self.locate(embeds, attention_mask, position_ids, past_length)
        mask = create_causal_mask(self.config, embeds, attention_mask, cache, position_ids)
        encoder_mask = None
        if encoder_hidden_states is not None:
            encoder_mask = create_bidirectional_mask(
                self.config, embeds, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        for layer in self.layers:
            states = layer(
                states,
                mask,
                encoder_hidden_states,  # by position, so that reentrant checkpointing gives it a gradient
                encoder_mask,
                rotary=rotary,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(states), past_key_values=past_key_values
        )


class CalibTransformerModel(CalibTransformerPreTrainedModel):
    """The encoder reads one sequence; the decoder reads another and looks at what the encoder made of the first.

    Args:
        config (`CalibTransformerConfig`): the sizes of both.
    """

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(with_flags(config, is_encoder_decoder=True, is_decoder=False))
        self.encoder = CalibTransformerEncoderModel(self.config)
        self.decoder = CalibTransformerDecoderModel(self.config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, config=None, **kwargs):
        """As `PreTrainedModel.from_pretrained`; for `AutoModel`, a stack that was saved alone stays what it is."""
        if isinstance(config, CalibTransformerConfig) and not config.is_encoder_decoder:
            stack = CalibTransformerDecoderModel if config.is_decoder else CalibTransformerEncoderModel
            return stack.from_pretrained(*args, config=config, **kwargs)
        return super().from_pretrained(*args, config=config, **kwargs)

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value
        else:
            self.decoder.resize_token_embeddings(value.num_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        r"""Encode one batch of sequences and decode another.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`, integer in `[0, vocab_size)`): the encoder's tokens.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for a token, 0 for padding, on any side.
            decoder_input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): the decoder's tokens.
            decoder_attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): their padding, with a cache also
                that of the tokens in it.
            encoder_outputs (`BaseModelOutput` or `tuple`, *optional*): what the encoder returned before, in place of
                `input_ids`.
            past_key_values (`EncoderDecoderCache`, *optional*): keys and values of the decoder's tokens so far.
            inputs_embeds, decoder_inputs_embeds (`torch.Tensor` of shape `(B, S or T, C)`, *optional*): vectors in
                place of tokens.
            use_cache, output_hidden_states, output_attentions (`bool`, *optional*): as in the decoder.

        Returns:
            `Seq2SeqModelOutput`: the decoder's `last_hidden_state` `(B, T, C)`, `past_key_values`,
            `encoder_last_hidden_state` `(B, S, C)`, and what was asked for of both.

        Raises:
            ValueError: as encoder and decoder.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


def with_flags(config, **flags):
    """The configuration with these values; a copy where they differ, because the caller's is left as it is."""
    if any(getattr(config, name) != value for name, value in flags.items()):
        config = copy.deepcopy(config)
        for name, value in flags.items():
            setattr(config, name, value)
    return config


def check_shape(name, value, *allowed, ndim=None):
    """Raises a ValueError unless `value` is None, has one of the allowed shapes, or not `ndim` dimensions."""
    if isinstance(value, torch.Tensor) and ndim in (None, value.ndim) and tuple(value.shape) not in allowed:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed is {' or '.join(map(str, allowed))}.")


# --- models with a head


def language_model_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
):
    """transformers' loss of a language model; on a CPU the same in half the time and memory.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`): scores.
        labels (`torch.Tensor` of shape `(B, T)`, int64): tokens, each to be predicted from the place before its own.
        vocab_size (`int`): V.
        num_items_in_batch (`int` or `torch.Tensor` of shape `()`, *optional*): labels in the whole accumulated batch.
        ignore_index (`int`): label that does not count.
        shift_labels (`torch.Tensor` of shape `(B, T)`, int64, *optional*): what each place has to predict, in place of
            `labels`.

    Returns:
        `torch.Tensor` of shape `()`: the cross-entropy in nats, its sum over labels divided by `num_items_in_batch`,
        or its mean without it.
    """
    if not is_plain_cpu(logits, logits):
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs
        )
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    total = CrossEntropySum.apply(logits.flatten(0, -2), shift_labels.flatten(), ignore_index)
    return total / ((shift_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class CalibTransformerForConditionalGeneration(CalibTransformerPreTrainedModel, GenerationMixin):
    """Encoder, decoder and a language-model head: translates, summarises, answers.

    Args:
        config (`CalibTransformerConfig`): the sizes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(with_flags(config, is_encoder_decoder=True, is_decoder=False))
        self.model = CalibTransformerModel(self.config)
        self.lm_head = CalibTransformerLinear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = language_model_loss
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels):
        """The labels `(B, T)` one place to the right, after `decoder_start_token_id`; -100 becomes padding."""
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("config.decoder_start_token_id=None: set it, or bos_token_id, or pad_token_id.")
        shifted = F.pad(labels[:, :-1], (1, 0), value=start)
        pad = start if self.config.pad_token_id is None else self.config.pad_token_id
        return shifted.masked_fill(shifted == -100, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        r"""Score every token of the vocabulary as the decoder's next one.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`, integer in `[0, vocab_size)`): the encoder's tokens.
            labels (`torch.Tensor` of shape `(B, T)`, int64, *optional*): the token that should follow each of the
                decoder's; -100 does not count. They also make the `decoder_input_ids` where those are not given.
            num_items_in_batch (`int`, *optional*): labels in the whole accumulated batch; the loss is divided by it.
            attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values, inputs_embeds,
                decoder_inputs_embeds, use_cache, output_hidden_states, output_attentions: as in
                `CalibTransformerModel`. With labels, no cache is made unless asked for.

        Returns:
            `Seq2SeqLMOutput`: `logits` `(B, T, V)`, `loss` `()` (mean cross-entropy in nats) when there are labels,
            and what `CalibTransformerModel` returns, but for its `last_hidden_state`.

        Raises:
            ValueError: as `CalibTransformerModel`, or the labels have another shape.
        """
        if labels is not None:
            use_cache = bool(use_cache)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            check_shape("labels", labels, tuple(logits.shape[:2]))
            # shift_labels: the decoder's tokens are shifted already, so the loss must not do it again
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], shift_labels=labels, **kwargs
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


class CalibTransformerForCausalLM(CalibTransformerPreTrainedModel, GenerationMixin):
    """A decoder that stands alone, and a language-model head: continues a text.

    Args:
        config (`CalibTransformerConfig`): the sizes; `num_hidden_layers` is the number of layers.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(with_flags(config, is_encoder_decoder=False, is_decoder=True))
        self.model = CalibTransformerDecoderModel(self.config)
        self.lm_head = CalibTransformerLinear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = language_model_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        r"""Score every token of the vocabulary as the next one.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens that are not in the
                cache.
            labels (`torch.Tensor` of shape `(B, T)`, int64, *optional*): the tokens again; those from the second on
                are what the one before should have predicted. -100 does not count.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): how many of the last positions, or which, to
                score. 0 scores all.
            num_items_in_batch (`int`, *optional*): labels in the whole accumulated batch; the loss is divided by it.
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
                output_attentions: as in `CalibTransformerDecoderModel`. With labels, no cache is made unless asked
                for.

        Returns:
            `CausalLMOutputWithPast`: `logits` `(B, T, V)`, `loss` `()` (the mean cross-entropy in nats) when there are
            labels, `past_key_values`, and on request `hidden_states` and `attentions`.

        Raises:
            ValueError: as `CalibTransformerDecoderModel`, or the labels have another shape.
        """
        if labels is not None:
            use_cache = bool(use_cache)
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            check_shape("labels", labels, tuple(logits.shape[:2]))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


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
    check_shape("attention_mask", attention_mask, tuple(hidden_states.shape[:2]))
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
        super().__init__(with_flags(config, is_encoder_decoder=False, is_decoder=False))
        self.model = CalibTransformerEncoderModel(self.config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        # With a bias, so that a calibrator with one (vector, matrix scaling) can be folded into the head
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_function = sequence_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, labels=None, **kwargs
    ):
        r"""Score a batch of sequences.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens.
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*): int64 classes, floating targets
                for regression (`num_labels=1`), or floating 0/1 flags for multi-label; `config.problem_type` decides.
            num_items_in_batch (`int`, *optional*): labels in the whole accumulated batch; the loss is divided by it.
            attention_mask, inputs_embeds, position_ids, output_hidden_states, output_attentions: as in
                `CalibTransformerEncoderModel`.

        Returns:
            `SequenceClassifierOutput`: `logits` `(B, num_labels)`, `loss` `()` when there are labels, and on request
            `hidden_states` and `attentions`.

        Raises:
            ValueError: as `CalibTransformerEncoderModel`, or `attention_mask` or the labels have another shape.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds, position_ids, **kwargs)
        pooled = mean_over_tokens(outputs.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            check_shape("labels", labels, (logits.shape[0],), (logits.shape[0], 1), tuple(logits.shape))
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CalibTransformerForTokenClassification(CalibTransformerPreTrainedModel):
    """The encoder and a linear head on every token: one row of logits per token.

    Args:
        config (`CalibTransformerConfig`): the sizes; `num_labels` or `id2label` sets the number of logits.
    """

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(with_flags(config, is_encoder_decoder=False, is_decoder=False))
        self.model = CalibTransformerEncoderModel(self.config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, labels=None, **kwargs
    ):
        r"""Score every token of a batch of sequences.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens.
            labels (`torch.Tensor` of shape `(B, T)`, int64, *optional*): classes; -100 does not count.
            num_items_in_batch (`int`, *optional*): labels in the whole accumulated batch; the loss is divided by it.
            attention_mask, inputs_embeds, position_ids, output_hidden_states, output_attentions: as in
                `CalibTransformerEncoderModel`.

        Returns:
            `TokenClassifierOutput`: `logits` `(B, T, num_labels)`, `loss` `()` (the mean cross-entropy in nats) when
            there are labels, and on request `hidden_states` and `attentions`.

        Raises:
            ValueError: as `CalibTransformerEncoderModel`, or the labels have another shape.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds, position_ids, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_shape("labels", labels, tuple(logits.shape[:2]))
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CalibTransformerForQuestionAnswering(CalibTransformerPreTrainedModel):
    """The encoder and two scores for every token: is it the first, is it the last of the answer.

    Args:
        config (`CalibTransformerConfig`): the sizes.
    """

    def __init__(self, config: CalibTransformerConfig):
        super().__init__(with_flags(config, is_encoder_decoder=False, is_decoder=False))
        self.model = CalibTransformerEncoderModel(self.config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ):
        r"""Score every token as the first and as the last one of the answer.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, integer in `[0, vocab_size)`): tokens.
            start_positions, end_positions (`torch.Tensor` of shape `(B,)`, int64, *optional*): the answer's first and
                last token. T and more (the answer was cut off) does not count.
            attention_mask, inputs_embeds, position_ids, output_hidden_states, output_attentions: as in
                `CalibTransformerEncoderModel`.

        Returns:
            `QuestionAnsweringModelOutput`: `start_logits` and `end_logits` `(B, T)`, `loss` `()` (the mean of the two
            cross-entropies over the tokens, in nats) when there are positions, and on request `hidden_states` and
            `attentions`.

        Raises:
            ValueError: as `CalibTransformerEncoderModel`, or the positions have another shape.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds, position_ids, **kwargs)
        start_logits, end_logits = self.qa_outputs(self.dropout(outputs.last_hidden_state)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
                check_shape(name, positions, (start_logits.shape[0],), (start_logits.shape[0], 1))
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "CalibTransformerDecoderModel",
    "CalibTransformerEncoderModel",
    "CalibTransformerForCausalLM",
    "CalibTransformerForConditionalGeneration",
    "CalibTransformerForQuestionAnswering",
    "CalibTransformerForSequenceClassification",
    "CalibTransformerForTokenClassification",
    "CalibTransformerModel",
    "CalibTransformerPreTrainedModel",
]
