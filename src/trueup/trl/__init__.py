"""TRL's names on trueup: a script of TRL's changes its import line, and nothing else.

    from trueup.trl import DPOConfig, DPOTrainer

What TRL's defaults are is what happens here; what cannot be honoured is refused with trueup's name for it.
"""

from trueup.trl.configs import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SFTConfig,
)
from trueup.trl.scripts import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)
from trueup.trl.trainers import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    ORPOTrainer,
    RewardTrainer,
    SFTTrainer,
)

__all__ = [
    "DPOConfig", "DPOTrainer", "DatasetMixtureConfig", "GRPOConfig", "GRPOTrainer", "KTOConfig", "KTOTrainer",
    "ModelConfig", "ORPOConfig", "ORPOTrainer", "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer",
    "ScriptArguments", "TrlParser", "get_dataset", "get_kbit_device_map", "get_peft_config", "get_quantization_config",
]  # fmt: skip
