"""Training: stages, the loop, checkpoints and loggers."""

from flows.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint
from flows.training.ema import ExponentialMovingAverage
from flows.training.folder import OutputFolderError
from flows.training.loggers import HParams, JSONLinesLogger, Logger, ProgressBar, TensorBoardLogger, read_metrics
from flows.training.loss import NonFiniteLossError
from flows.training.runs import build_dataset, build_flow, load_flow
from flows.training.stage import Stage
from flows.training.stopping import TrainingInterrupted
from flows.training.summary import Summary
from flows.training.trainer import Trainer
from flows.training.trusted import check_trusted

__all__ = [
    "CheckpointError",
    "ExponentialMovingAverage",
    "HParams",
    "JSONLinesLogger",
    "Logger",
    "NonFiniteLossError",
    "OutputFolderError",
    "ProgressBar",
    "Stage",
    "Summary",
    "TensorBoardLogger",
    "Trainer",
    "TrainingInterrupted",
    "build_dataset",
    "build_flow",
    "check_trusted",
    "find_checkpoint",
    "load_checkpoint",
    "load_flow",
    "read_metrics",
    "save_checkpoint",
]
