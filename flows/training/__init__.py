"""Train a model: stages, the loop, checkpoints and loggers."""

from flows.training.building import build_dataset, build_flow
from flows.training.callbacks import Reporting
from flows.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint
from flows.training.events import TensorBoardLogger
from flows.training.fabric import Hardware
from flows.training.files import OutputFolderError
from flows.training.loading import load_flow
from flows.training.loggers import HParams, JSONLinesLogger, Logger, ProgressBar, read_metrics, training_curves
from flows.training.loop import NonFiniteLossError
from flows.training.signals import TrainingInterrupted
from flows.training.stage import Optimization, Stage
from flows.training.state import ExponentialMovingAverage, Run
from flows.training.trainer import Summary, Trainer
from flows.training.trusted import check_trusted

__all__ = [
    "CheckpointError",
    "ExponentialMovingAverage",
    "HParams",
    "Hardware",
    "JSONLinesLogger",
    "Logger",
    "NonFiniteLossError",
    "Optimization",
    "OutputFolderError",
    "ProgressBar",
    "Reporting",
    "Run",
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
    "training_curves",
]
