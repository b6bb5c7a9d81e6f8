"""Callbacks that Composer lacks, named in the YAML's section `callbacks`.

To add one: a file here with a `composer.core.Callback`, and its class in `__all__`. The YAML's key is the class's name
in snake_case (`run/names.py`), its keywords are those of `__init__`.
"""

from composer_path.callbacks.batch_report import BatchReport
from composer_path.callbacks.save_weights import SaveWeights
from composer_path.callbacks.source_report import SourceReport
from composer_path.callbacks.speed_report import SpeedReport
from composer_path.callbacks.step_line import StepLine
from composer_path.callbacks.step_profile import StepProfile

__all__ = ["BatchReport", "SaveWeights", "SourceReport", "SpeedReport", "StepLine", "StepProfile"]
