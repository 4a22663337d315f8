"""Reliability diagrams for the trackers that `report_to` names, beside the scores of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs

from ..calibrators.rows import warn_caller
from ..metrics import EventMetric
from ..plots import plot_reliability, prepare_reliability_from


def log_diagram(trainer: Trainer, prefix: str, confidences: EventMetric | None) -> None:
    """Draws what an evaluation has seen, and sends it to TensorBoard, Weights & Biases and Trackio.

    Nothing is drawn where none of them is used, or on other processes than the first. Without matplotlib, it warns.

    Args:
        trainer ([`~transformers.Trainer`]): whose trackers have had this evaluation's scores.
        prefix (`str`): of the scores, such as `"eval"`; the diagram is then `eval/reliability`.
        confidences ([`EventMetric`], *optional*): as `prepare_reliability_from` takes it; None: nothing to draw.
    """
    senders = [
        (send, callback)
        for callback in trainer.callback_handler.callbacks
        for kind, send in SENDERS.items()
        if isinstance(callback, kind)
    ]
    if confidences is None or not senders or not trainer.is_world_process_zero():
        return
    step = trainer.state.global_step
    try:
        ax = plot_reliability(prepare_reliability_from(confidences), title=f"{prefix}, step {step:,}")
    except ImportError as error:
        warn_caller(f"No reliability diagram is logged: {error}")
        return
    (name,) = rewrite_logs({f"{prefix}_reliability": None})  # named as Trainer names the scores for its trackers
    for send, callback in senders:
        send(callback, name, _pixels(ax.figure), step)


def _pixels(figure: Any) -> np.ndarray:
    """`(height, width, 3)` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _to_tensorboard(callback: TensorBoardCallback, name: str, image: np.ndarray, step: int) -> None:
    callback.tb_writer.add_image(name, image, step, dataformats="HWC")
    callback.tb_writer.flush()


def _to_wandb(callback: WandbCallback, name: str, image: np.ndarray, step: int) -> None:
    import wandb

    wandb.log({name: wandb.Image(image), "train/global_step": step})


def _to_trackio(callback: TrackioCallback, name: str, image: np.ndarray, step: int) -> None:
    import trackio

    trackio.log({name: trackio.Image(image), "train/global_step": step})


SENDERS: dict[type[TrainerCallback], Callable[[Any, str, np.ndarray, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    TrackioCallback: _to_trackio,
}
