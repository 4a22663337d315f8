"""The CalibTransformer family and its registration with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_calib_transformer import CalibTransformerConfig
from .modeling_calib_transformer import (
    CalibTransformerDecoderModel,
    CalibTransformerEncoderModel,
    CalibTransformerForCausalLM,
    CalibTransformerForConditionalGeneration,
    CalibTransformerForQuestionAnswering,
    CalibTransformerForSequenceClassification,
    CalibTransformerForTokenClassification,
    CalibTransformerModel,
    CalibTransformerPreTrainedModel,
)


AUTO_CLASSES = {
    AutoModel: CalibTransformerModel,
    AutoModelForCausalLM: CalibTransformerForCausalLM,
    AutoModelForQuestionAnswering: CalibTransformerForQuestionAnswering,
    AutoModelForSeq2SeqLM: CalibTransformerForConditionalGeneration,
    AutoModelForSequenceClassification: CalibTransformerForSequenceClassification,
    AutoModelForTokenClassification: CalibTransformerForTokenClassification,
}


def register():
    """Make the Auto classes know `model_type="calib_transformer"`. Calling it again changes nothing.

    transformers has no plug-in discovery, so this runs at `import hf_calib`.
    """
    AutoConfig.register(CalibTransformerConfig.model_type, CalibTransformerConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(CalibTransformerConfig, model_class, exist_ok=True)


__all__ = [
    "CalibTransformerConfig",
    "CalibTransformerDecoderModel",
    "CalibTransformerEncoderModel",
    "CalibTransformerForCausalLM",
    "CalibTransformerForConditionalGeneration",
    "CalibTransformerForQuestionAnswering",
    "CalibTransformerForSequenceClassification",
    "CalibTransformerForTokenClassification",
    "CalibTransformerModel",
    "CalibTransformerPreTrainedModel",
    "register",
]
