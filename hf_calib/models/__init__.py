"""The CalibTransformer family and its registration with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_calib_transformer import CalibTransformerConfig
from .modeling_calib_transformer import (
    CalibTransformerEncoderModel,
    CalibTransformerForSequenceClassification,
    CalibTransformerPreTrainedModel,
)


def register():
    """Make the Auto classes know `model_type="calib_transformer"`. Calling it again changes nothing.

    transformers has no plug-in discovery, so this runs at `import hf_calib`.
    """
    AutoConfig.register(CalibTransformerConfig.model_type, CalibTransformerConfig, exist_ok=True)
    AutoModel.register(CalibTransformerConfig, CalibTransformerEncoderModel, exist_ok=True)
    AutoModelForSequenceClassification.register(
        CalibTransformerConfig, CalibTransformerForSequenceClassification, exist_ok=True
    )


__all__ = [
    "CalibTransformerConfig",
    "CalibTransformerEncoderModel",
    "CalibTransformerForSequenceClassification",
    "CalibTransformerPreTrainedModel",
    "register",
]
