"""Every option of the project, in frozen dataclasses; gpt2.cli makes command lines of them.

`python scripts/train_gpt2.py --help` shows the same words.
"""

from gpt2.config.finetune import DPOConfig, FineTuneConfig, SFTConfig
from gpt2.config.generation import ChatConfig, CompareConfig, SampleConfig, Sampling
from gpt2.config.lora import LORA_LAYERS, LoRAConfig, LoRAOptions
from gpt2.config.model import PRESETS, GPTConfig
from gpt2.config.tools import (
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    ReportConfig,
    ShowBatchConfig,
    VerifyConfig,
)
from gpt2.config.train import DataSource, TrainConfig, data_sources, spell_sources
from gpt2.config.words import nearest_multiples, suggest

__all__ = [
    "ChatConfig",
    "CompareConfig",
    "DPOConfig",
    "DataSource",
    "EvaluateConfig",
    "ExportConfig",
    "FineTuneConfig",
    "GPTConfig",
    "LORA_LAYERS",
    "LoRAConfig",
    "LoRAOptions",
    "PRESETS",
    "PrepareConfig",
    "ReportConfig",
    "SFTConfig",
    "SampleConfig",
    "Sampling",
    "ShowBatchConfig",
    "TrainConfig",
    "VerifyConfig",
    "data_sources",
    "nearest_multiples",
    "spell_sources",
    "suggest",
]
