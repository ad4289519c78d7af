"""What PPO takes from TRL that TRL does not promise to keep: the only module to mend when TRL changes."""

from trl.kernels import ChunkedLogProbFunction
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id

__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "ChunkedLogProbFunction",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "get_soft_overlong_punishment",
]
