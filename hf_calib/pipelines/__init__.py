"""Answers and generated texts with a probability that can be calibrated: pipelines that transformers 5 has removed.

Importing this module registers two tasks, `"calibrated-question-answering"` and `"calibrated-text2text-generation"`
(translation, summarisation). The score of an answer or a text is one probability, from the logits that the model
gives: those of a model with a calibrator attached or folded are calibrated.

    import hf_calib.pipelines
    from transformers import pipeline

    reader = pipeline("calibrated-question-answering", model=model, tokenizer=tokenizer)

Where the model is a folder or a Hub id, transformers loads it: a folded calibrator acts, an attached one is not seen.
For that, pass `model=hf_calib.load_calibrated(folder)` and the tokenizer.

Even where every token's probability is right, that of an answer need not be: what is likely in this text is not
always what is true. Labelled examples correct that, in a second step that sees the whole score:

    answers = reader(questions)  # dicts with a question and a context
    right = torch.tensor([answer["answer"] == truth for answer, truth in zip(answers, truths)]).long()
    scores = log_odds([answer["score"] for answer in answers])
    IsotonicCalibration(task="binary").fit(scores, right).save_pretrained("answers")  # few examples: PlattScaling

    reader = pipeline("calibrated-question-answering", model=model, tokenizer=tokenizer, calibrator="answers")

Fit it on what it will map: the best answers, by the same model and its calibrator, with the same options. Save it into
a folder of its own: beside a model, `calibrator.json` is the model's. A saved pipeline does not hold it.
"""

from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM
from transformers.pipelines import PIPELINE_REGISTRY

from .answering import CalibratedQuestionAnsweringPipeline
from .generating import CalibratedText2TextGenerationPipeline
from .scoring import log_odds


__all__ = ["CalibratedQuestionAnsweringPipeline", "CalibratedText2TextGenerationPipeline", "log_odds"]


def _register() -> None:
    for task, kind, auto_class in (
        ("calibrated-question-answering", CalibratedQuestionAnsweringPipeline, AutoModelForQuestionAnswering),
        ("calibrated-text2text-generation", CalibratedText2TextGenerationPipeline, AutoModelForSeq2SeqLM),
    ):
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=kind, pt_model=auto_class, type="text")
        # A pipeline's save_pretrained would take it for code of one's own: copy it into the folder, which would then
        # not load without trust_remote_code.
        del kind._registered_impl


_register()
