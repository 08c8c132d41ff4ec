"""What can be set for a run: plain dataclasses, one field per command-line option, checked on construction.

`RunConfig` holds what every task shares (optimiser, schedule, saving, machines); a task derives from it and adds its
model and data. The command line and YAML files are made from the same fields, so an option is written once, here.
"""

from .classify import ClassifyConfig
from .lm import LmConfig
from .run import RunConfig, resumed
from .translate import TranslateConfig

__all__ = ["ClassifyConfig", "LmConfig", "RunConfig", "TranslateConfig", "resumed"]
