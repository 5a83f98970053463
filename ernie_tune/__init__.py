"""ernie_tune: fine-tune ERNIE-4.5-VL with PaddlePaddle.

Importing this module is cheap and does not import paddle: every public name is resolved on first
use (PEP 562). It does set the environment variables that make paddle's CPU products fast
(`config/cpu.py`), since they count only before paddle loads; what the user has set stays.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from ernie_tune.config.cpu import prepare_cpu, while_paddle_loads
from ernie_tune.config.secrets import clean_launcher_files, take_secrets

__version__ = "0.1.0"

CPU_PLAN = prepare_cpu()
take_secrets(os.environ)  # both do nothing but in a worker of Paddle's launcher
clean_launcher_files(os.environ)

# public name -> module that defines it; the table is the whole public surface
_PUBLIC = {
    "AutoModel": "ernie_tune.checkpoint.auto",
    "AutoConfig": "ernie_tune.checkpoint.auto",
    "AutoProcessor": "ernie_tune.data.processor",
    "AutoTokenizer": "ernie_tune.data.tokenizer",
    "DPOTrainer": "ernie_tune.trainers.preference",
    "GRPOConfig": "ernie_tune.config.training_arguments",
    "GRPOTrainer": "ernie_tune.trainers.online",
    "KTOTrainer": "ernie_tune.trainers.preference",
    "LoraConfig": "ernie_tune.peft.config",
    "ModelConfig": "ernie_tune.models.config",
    "PPOConfig": "ernie_tune.config.training_arguments",
    "PPOTrainer": "ernie_tune.trainers.ppo",
    "PaddleTrainer": "ernie_tune.trainers.sft",
    "PeftModel": "ernie_tune.peft.model",
    "PretrainTrainer": "ernie_tune.trainers.sft",
    "RLVRTrainer": "ernie_tune.trainers.online",
    "RewardModel": "ernie_tune.trainers.reward",
    "RewardTrainer": "ernie_tune.trainers.reward",
    "SFTTrainer": "ernie_tune.trainers.sft",
    "TrainingArguments": "ernie_tune.config.training_arguments",
    "UPOTrainer": "ernie_tune.trainers.upo",
    "adopt": "ernie_tune.trainers.neighbours",
    "estimate": "ernie_tune.plan.estimate",
    "export": "ernie_tune.export",
    "give_back": "ernie_tune.trainers.neighbours",
    "get_peft_model": "ernie_tune.peft.model",
    "launch": "ernie_tune.cli.launch",
    "load_dataset": "ernie_tune.data.sources",
    "preset": "ernie_tune.models.presets",
}

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoProcessor",
    "AutoTokenizer",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOTrainer",
    "LoraConfig",
    "ModelConfig",
    "PPOConfig",
    "PPOTrainer",
    "PaddleTrainer",
    "PeftModel",
    "PretrainTrainer",
    "RLVRTrainer",
    "RewardModel",
    "RewardTrainer",
    "SFTTrainer",
    "TrainingArguments",
    "UPOTrainer",
    "__version__",
    "adopt",
    "estimate",
    "export",
    "get_peft_model",
    "give_back",
    "launch",
    "load_dataset",
    "preset",
]

if TYPE_CHECKING:
    from ernie_tune import export
    from ernie_tune.checkpoint.auto import AutoConfig, AutoModel
    from ernie_tune.cli.launch import launch
    from ernie_tune.config.training_arguments import GRPOConfig, PPOConfig, TrainingArguments
    from ernie_tune.data.processor import AutoProcessor
    from ernie_tune.data.sources import load_dataset
    from ernie_tune.data.tokenizer import AutoTokenizer
    from ernie_tune.models.config import ModelConfig
    from ernie_tune.models.presets import preset
    from ernie_tune.peft.config import LoraConfig
    from ernie_tune.peft.model import PeftModel, get_peft_model
    from ernie_tune.plan.estimate import estimate
    from ernie_tune.trainers.neighbours import adopt, give_back
    from ernie_tune.trainers.online import GRPOTrainer, RLVRTrainer
    from ernie_tune.trainers.ppo import PPOTrainer
    from ernie_tune.trainers.preference import DPOTrainer, KTOTrainer
    from ernie_tune.trainers.reward import RewardModel, RewardTrainer
    from ernie_tune.trainers.sft import PaddleTrainer, PretrainTrainer, SFTTrainer
    from ernie_tune.trainers.upo import UPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ernie_tune' has no attribute {name!r}")
    with while_paddle_loads():
        module = importlib.import_module(_PUBLIC[name])
        if "ernie_tune.models.ernie" in sys.modules:
            _let_models_answer()
    value = (
        module if _PUBLIC[name] == f"{__name__}.{name}" else getattr(module, name)
    )  # `export` is a package that can be called
    globals()[name] = value
    return value


def _let_models_answer() -> None:
    """Give every model `chat` and `generate`. Models stand below what answers with them and do not
    know it: the package, which knows both, joins them."""
    model = importlib.import_module("ernie_tune.models.ernie").ErnieModel
    if "chat" not in vars(model):
        conversation = importlib.import_module("ernie_tune.generate.conversation")
        model.chat, model.generate = conversation.chat, conversation.generate


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
