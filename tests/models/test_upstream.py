"""Every class against the tests that transformers has for its own models."""

import unittest

import pytest
import torch

from . import upstream


if not upstream.FOLDER.is_dir():
    pytest.skip("transformers' tests are not unpacked: `make test` does it", allow_module_level=True)
pytest.importorskip("parameterized")
upstream.install()

from transformers.models.auto import modeling_auto  # noqa: E402
from transformers_tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

from hf_calib.models import (  # noqa: E402
    CalibTransformerConfig,
    CalibTransformerDecoderModel,
    CalibTransformerEncoderModel,
    CalibTransformerForCausalLM,
    CalibTransformerForConditionalGeneration,
    CalibTransformerForQuestionAnswering,
    CalibTransformerForSequenceClassification,
    CalibTransformerForTokenClassification,
    CalibTransformerModel,
)


# Their warnings are not ours: several features are tested under the old names that they warn of
pytestmark = pytest.mark.filterwarnings("ignore")

# The mixins choose inputs and labels by these tables of class names, which AutoModel.register does not touch
HEADS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": CalibTransformerForCausalLM,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": CalibTransformerForQuestionAnswering,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": CalibTransformerForConditionalGeneration,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": CalibTransformerForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": CalibTransformerForTokenClassification,
}


class TinyModels:
    """What the mixins ask for: sizes, a configuration and a batch."""

    batch_size, seq_length, encoder_seq_length, decoder_seq_length = 3, 7, 7, 7
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_labels = 99, 32, 2, 4, 3
    is_training = True

    def __init__(self, test):
        self.flags = test.flags
        self.is_encoder_decoder = test.flags.get("is_encoder_decoder", False)
        self.causal_lm_class = CalibTransformerForCausalLM

    def get_config(self):
        return CalibTransformerConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=0.1,
            bos_token_id=1,
            eos_token_id=2,
            **self.flags,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        names = ["", "decoder_"] if self.is_encoder_decoder else [""]
        inputs = {f"{name}input_ids": ids_tensor(shape, self.vocab_size).clamp(min=3) for name in names}
        inputs |= {f"{name}attention_mask": torch.ones(shape, dtype=torch.long) for name in names}
        return self.get_config(), inputs


class Common(ModelTesterMixin):
    @pytest.fixture(autouse=True)
    def _tables(self, monkeypatch):
        base = self.all_model_classes[0].__name__
        monkeypatch.setitem(modeling_auto.MODEL_MAPPING_NAMES, "calib_transformer", base)
        for table, head in HEADS.items():
            monkeypatch.setitem(getattr(modeling_auto, table), "calib_transformer", head.__name__)

    def setUp(self):
        self.model_tester = TinyModels(self)

    def test_config(self):
        ConfigTester(self, config_class=CalibTransformerConfig, hidden_size=32).run_common_tests()


class EncoderDecoderTest(Common, GenerationTesterMixin, unittest.TestCase):
    flags = {"is_encoder_decoder": True}  # noqa: RUF012
    is_encoder_decoder = True
    all_model_classes = (CalibTransformerModel, CalibTransformerForConditionalGeneration)


class DecoderTest(Common, TrainingTesterMixin, GenerationTesterMixin, unittest.TestCase):
    flags = {"is_decoder": True}  # noqa: RUF012
    all_model_classes = (CalibTransformerDecoderModel, CalibTransformerForCausalLM)


class EncoderTest(Common, unittest.TestCase):
    flags = {}  # noqa: RUF012
    all_model_classes = (
        CalibTransformerEncoderModel,
        CalibTransformerForSequenceClassification,
        CalibTransformerForTokenClassification,
        CalibTransformerForQuestionAnswering,
    )
