"""Callbacks that Composer lacks."""

from composer_path.callbacks.batch_report import BatchReport
from composer_path.callbacks.save_weights import SaveWeights
from composer_path.callbacks.source_report import SourceReport
from composer_path.callbacks.speed_report import SpeedReport
from composer_path.callbacks.step_line import StepLine

__all__ = ["BatchReport", "SaveWeights", "SourceReport", "SpeedReport", "StepLine"]
