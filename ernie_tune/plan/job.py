"""What a run computes, reduced to what costs memory and time: the model's shape, what is trained,
in which format, on how many tokens.

Refuses to know: the layout (layouts.py), the card (cards.py), files but a model folder's
config.json.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ernie_tune.config.arguments import ADDED, RunConfig
from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say
from ernie_tune.config.stages import STAGES
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.config_file import config_in
from ernie_tune.models.presets import preset
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.packed_header import PackedBits, is_packed, packed_bits, packed_settings
from ernie_tune.peft.settings import lora_config

PAIRED = ("DPO", "RM")  # stages whose rows are two answers
ROLLOUT_ROWS = 64  # answers that one process samples side by side, at most


def model_shape(name: str) -> ModelConfig:
    """The shape of a model folder (its config.json), of a released model by its hub name, or of a
    preset. ValueError or OSError where there is none.
    """
    file = Path(name) / "config.json"
    if file.is_file():
        return config_in(file, packed_settings(file) if is_packed(Path(name)) else read_json_object(file))
    return preset(name)


def known_shape(name: str) -> ModelConfig | None:
    """`model_shape`, None for a model that is neither here nor known by name. A folder's
    config.json that cannot be read still raises ValueError.
    """
    if (Path(name) / "config.json").is_file():
        return model_shape(name)
    try:
        return preset(name)
    except ValueError:  # no such name
        return None


@dataclass(frozen=True)
class Job:
    """One step of a run. Sizes are upper bounds: rows are taken to be as long as allowed, every
    text token to be a target.

    `rows`: rows of a micro-batch; `visual_tokens`: tokens of a micro-batch that are pictures.
    `element_bytes`: of the compute format. `reference`: "none", "adapter" (switched off), or "copy"
    (a second frozen model). While answers are sampled the key/value cache holds `sequences` of
    them, of `completion_tokens` each, and once each of the `sequence_prompts` prompts that they
    share; prompt and answer take `sequence_tokens`.
    `packed`: how its matrices lie there where the base is a packed folder.
    `moment_bytes` and `gradient_bytes` (0: what this library does) exist to compare with recipes
    that store them otherwise.
    `critic`: "none", "adapter" (on the policy's base) or "copy" (a second trained model).
    `reward_model`: one beside the policy, taken to be as large; not one that is an adapter.
    """

    model: ModelConfig
    name: str = ""
    stage: str = "SFT"
    method: str = "Full"
    lora: LoraConfig | None = None
    freeze: tuple[str, ...] = ()
    added_width: int = 0
    quantize: str = "none"
    element_bytes: int = 2
    recompute: bool = False
    rows: int = 1
    row_tokens: int = 8192
    accumulation: int = 1
    visual_tokens: int = 0
    reference: str = "none"
    critic: str = "none"
    reward_model: bool = False
    sequences: int = 0
    sequence_prompts: int = 0
    sequence_tokens: int = 0
    completion_tokens: int = 0
    packed: PackedBits | None = None
    moment_bytes: int = 4
    gradient_bytes: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def coded(self) -> bool:
        """Whether the base is held as int8 or int4 codes."""
        return self.quantize != "none" or self.packed is not None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, at most; a pair is two answers, each with its prompt."""
        return self.rows * self.row_tokens * (2 if self.stage in PAIRED else 1)

    @property
    def full(self) -> bool:
        """Whether the model's own weights are trained."""
        return self.method in ("Full", "Freeze")

    def replace(self, **changes: object) -> Job:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _answers_at_once(config: RunConfig) -> int:
    """Answers that one process samples side by side: those of a round, as many as fit the
    engine.
    """
    t, r = config.train, config.rollout
    answers = t.per_device_train_batch_size * t.gradient_accumulation_steps * r.num_mini_batches
    return min(answers, max(ROLLOUT_ROWS, r.num_generations))


def job_of(config: RunConfig, model: ModelConfig, *, on_cpu: bool = False, visual_tokens: int | None = None) -> Job:
    """The job that the settings describe. `visual_tokens` of a micro-batch, where known; else half
    of its tokens for a model with a vision tower.

    On a CPU everything is computed in float32.
    """
    m, t, lora = config.model, config.train, config.lora
    notes = []
    sampled = config.samples
    longest = config.data.max_seq_len
    if sampled:
        longest = min(longest, config.preference.max_prompt_len + config.rollout.max_completion_length)
    sequences = _answers_at_once(config) if sampled else 0
    adapter = (
        lora_config(lora, config.freeze.freeze_config, m.model_name_or_path, config.train.seed)
        if m.fine_tuning == "LoRA"
        else None
    )
    if lora.lora_expert_affinity > 0 and adapter is not None and not lora.lora_expert_list:
        adapter = dataclasses.replace(
            adapter, expert_targets="both" if lora.lora_experts == "none" else lora.lora_experts
        )
        notes.append(
            say(
                "lora_expert_affinity is measured when training starts: counted as if all those experts had adapters",
                "lora_expert_affinity 在训练开始时才测量：此处按这些专家都有适配器计算",
            )
        )
    if m.fine_tuning in ("Full", "Freeze") and (
        config.freeze.trainable_layers or config.freeze.frozen_layers or config.freeze.freeze_spec
    ):
        notes.append(
            say(
                "layers named in trainable_layers, frozen_layers or freeze_spec are counted as trained: an upper bound",
                "trainable_layers、frozen_layers 或 freeze_spec 中的层按参与训练计算：此为上限",
            )
        )
    job = Job(
        model,
        m.model_name_or_path,
        m.stage,
        m.fine_tuning,
        adapter,
        config.freeze.freeze_config,
        _added_width(config),
        config.compute.weight_quantize_algo,
        4 if on_cpu else 2,
        config.compute.recompute,
        t.per_device_train_batch_size,
        longest,
        t.gradient_accumulation_steps,
        reference=_reference(config),
        critic=_critic(config),
        reward_model=_reward_model(config),
        sequences=sequences,
        sequence_prompts=-(-sequences // config.rollout.num_generations),
        sequence_tokens=longest if sampled else 0,
        completion_tokens=config.rollout.max_completion_length if sampled else 0,
        packed=packed_bits(Path(m.model_name_or_path)) if is_packed(Path(m.model_name_or_path)) else None,
        notes=tuple(notes),
    )
    visual = visual_tokens if visual_tokens is not None else job.tokens // 2 if model.vision else 0
    if not 0 <= visual <= job.tokens or (visual and model.vision is None):
        raise ValueError(
            say(
                f"visual_tokens ({visual}) must be between 0 and the tokens of a micro-batch ("
                f"{(job.tokens if model.vision else 0)}); lower it",
                f"visual_tokens（{visual}）须在 0 与微批的 token 数（{(job.tokens if model.vision else 0)}"
                "）之间；请调小",
            )
        )
    return job.replace(visual_tokens=visual)


def _added_width(config: RunConfig) -> int:
    """Trained values per decoder layer and hidden channel of the added parts, roughly: they are
    small.
    """
    a = config.added
    if config.model.fine_tuning not in ADDED:
        return 0
    return 4 * a.adapter_width if config.model.fine_tuning == "Adapter" else a.num_virtual_tokens


def _reference(config: RunConfig) -> str:
    """What the reference log-probabilities come from."""
    stage, free = config.model.stage, config.reference.reference_free
    kl_coef = config.policy.kl_coef if config.policy.kl_coef is not None else 0.05 if stage == "PPO" else 0.0
    if not STAGES[stage].reference or free or (STAGES[stage].samples and config.preference.beta == kl_coef == 0):
        return "none"
    return "copy" if config.model.fine_tuning in ("Full", "Freeze") else "adapter"


def _critic(config: RunConfig) -> str:
    """What a critic is beside the policy."""
    if config.model.stage != "PPO":
        return "none"
    return "copy" if config.model.fine_tuning in ("Full", "Freeze") else "adapter"


def _reward_model(config: RunConfig) -> bool:
    """Whether a whole reward model lies beside the policy: one that is no adapter, as far as its
    folder says."""
    folder = config.critic.reward_model
    shared = config.model.fine_tuning not in ("Full", "Freeze") and Path(folder).is_dir()
    return bool(folder) and not (shared and not (Path(folder) / "config.json").is_file())
