"""Every setting of a run: frozen sections of at most 20 fields, composed in `RunConfig`. Names are those of ecosystem.md 4.1, first column.

Refuses to know: other spellings (aliases.py), where a value was written (loader.py), which values fit together (checks.py), paddle.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

STAGES = ("SFT", "DPO", "KTO", "UPO", "RLVR", "PT", "RM", "PPO")
ADDED = ("Adapter", "Prompt", "PTuning", "Prefix")  # methods that put new layers or tokens beside the frozen model
METHODS = ("LoRA", "Full", "Freeze", *ADDED)
FREEZE_WORDS = tuple(
    f"freeze_{part}" for part in ("vision", "aligner", "llm", "router", "text_experts", "vision_experts")
)
SHARDING = ("off", *(f"stage{n}{tail}" for n in (1, 2, 3) for tail in ("", " offload")))
WHEN = ("no", "steps", "epoch")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
CORRUPTIONS = ("none", "mask", "noise")
REF_MODES = ("auto", "model", "adapter_off", "adapter_ref", "precomputed", "none")


def arg(
    default: Any, help: str, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field with its help line, allowed words and inclusive range."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class DataArguments:
    """Which rows, in which proportion, cut to which length."""

    train_dataset_path: tuple[str, ...] = arg((), "training files, comma separated; path#500 takes 500 rows")
    train_dataset_type: tuple[str, ...] = arg(("auto",), "row format, one for all files or one a file")
    train_dataset_prob: tuple[float, ...] = arg((), "mixing weights, one a file", low=0)
    eval_dataset_path: tuple[str, ...] = arg((), "evaluation files, comma separated")
    eval_dataset_type: tuple[str, ...] = arg(("auto",), "row format of the evaluation files")
    val_size: float = arg(0.0, "rows held out of the training files: below 1 a share, else a count", low=0)
    dataset_dir: str = arg("", "folder of dataset_info.json; empty: this folder")
    mix_strategy: str = arg(
        "concat", "how files are mixed", ("concat", "random", "interleave_under", "interleave_over")
    )
    max_seq_len: int = arg(8192, "tokens in a row or pack, at most", low=2)
    truncation_strategy: str = arg(
        "delete", "rows that are too long; media are never cut", ("delete", "left", "right", "error")
    )
    packing: bool = arg(False, "put several rows in one sequence")
    greedy_intokens: bool = arg(False, "pack best-fit over a window of rows instead of in reading order")
    template: str = arg("auto", "chat template; auto: the model's own")
    template_backend: str = arg("custom", "renderer of the chat template", ("custom", "jinja"))
    dataloader_num_workers: int = arg(0, "processes that prepare rows; 0: none", low=0)


@dataclass(frozen=True)
class MediaArguments:
    """Size of pictures and videos. null: what the model folder says."""

    image_min_pixels: int | None = arg(None, "smaller images are enlarged", low=1)
    image_max_pixels: int | None = arg(None, "larger images are shrunk: the main memory knob", low=1)
    video_max_pixels: int | None = arg(None, "larger frames are shrunk", low=1)
    video_fps: float | None = arg(None, "frames taken a second", low=0)
    video_max_frames: int | None = arg(None, "frames taken of one video, at most", low=1)


@dataclass(frozen=True)
class ModelArguments:
    """Which weights, and what is done to them."""

    model_name_or_path: str = arg("", "folder, hub name, or preset")
    stage: str = arg("SFT", "training stage", STAGES)
    fine_tuning: str = arg("LoRA", "what is trained", METHODS)


@dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters (methods.md 4.13)."""

    lora_rank: int = arg(8, "inner width of the adapters", low=1)
    lora_alpha: int = arg(-1, "numerator of the scale; -1: twice the rank, or 4 with rslora", low=-1)
    lora_dropout: float = arg(0.0, "dropout before the adapters", low=0, high=0.99)
    lora_target_modules: tuple[str, ...] = arg(
        (), "layers that get adapters; empty: attention and dense feed-forward; all: every linear layer"
    )
    lora_path: str = arg("", "adapter folder to continue from")
    rslora: bool = arg(False, "scale by alpha/sqrt(rank) instead of alpha/rank")
    lora_plus_scale: float = arg(1.0, "learning rate of B over that of A (LoRA+)", low=0)
    dora: bool = arg(False, "train the magnitude of each column too (DoRA)")
    pissa: bool = arg(False, "start from the principal singular vectors (PiSSA)")
    lora_experts: str = arg("none", "experts that get adapters", ("none", "text", "vision", "both", "shared"))
    lora_expert_list: tuple[str, ...] = arg(
        (), "only these experts, as layer:text|vision:first-last, e.g. 3:vision:0-7"
    )
    lora_expert_affinity: float = arg(
        0.0, "only the fewest experts that take this share of the tokens; 0: all", low=0, high=1
    )

    @property
    def effective_alpha(self) -> int:
        """`lora_alpha`, or what -1 stands for: 4 with rsLoRA, else 2·rank (ecosystem.md 4.1)."""
        if self.lora_alpha != -1:
            return self.lora_alpha
        return 4 if self.rslora else 2 * self.lora_rank

    @property
    def scaling(self) -> float:
        """What multiplies B·A: alpha/rank, or alpha/sqrt(rank) with rsLoRA (methods.md 4.13)."""
        return self.effective_alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)


@dataclass(frozen=True)
class AddedArguments:
    """Bottleneck adapters, prompts and prefixes (methods.md 4.13)."""

    num_virtual_tokens: int = arg(20, "learned tokens before every row (Prompt, PTuning, Prefix)", low=1)
    prompt_encoder_width: int = arg(128, "inner width of the MLP that makes the prompt (PTuning)", low=1)
    adapter_width: int = arg(64, "inner width of the adapters (Adapter)", low=1)


@dataclass(frozen=True)
class FreezeArguments:
    """What stays as it is (methods.md 1.1, C14 and F12)."""

    freeze_config: tuple[str, ...] = arg((), "parts that stay frozen, separated by spaces", FREEZE_WORDS)
    trainable_layers: tuple[str, ...] = arg((), "layer numbers or names: only these are trained")
    frozen_layers: tuple[str, ...] = arg((), "layer numbers or names that stay frozen")
    freeze_spec: str = arg("", "JSON file with trainable_layers and frozen_layers")


@dataclass(frozen=True)
class TrainArguments:
    """How long, in what batches, on which loss."""

    num_train_epochs: float = arg(3.0, "passes over the data", low=0)
    max_steps: int = arg(-1, "optimizer steps; -1: num_train_epochs decides", low=-1)
    per_device_train_batch_size: int = arg(1, "rows a device and micro-step", low=1)
    gradient_accumulation_steps: int = arg(1, "micro-steps an optimizer step", low=1)
    seed: int = arg(42, "seed of weights, order and dropout", low=0, high=2**32 - 1)
    data_seed: int | None = arg(None, "seed of the order alone; null: seed", low=0, high=2**32 - 1)
    loss_norm: str = arg("token", "what the loss is averaged over", ("token", "seq", "token_balanced"))
    thought_weight: float = arg(1.0, "loss weight of tokens inside the thought", low=0)
    answer_weight: float = arg(1.0, "loss weight of tokens after the thought", low=0)
    router_aux_loss_coef: float = arg(0.0, "weight of the load-balance loss", low=0)
    router_z_loss_coef: float = arg(0.0, "weight of the router z-loss", low=0)
    moe_orthogonal_loss_lambda: float = arg(0.0, "weight of the router orthogonal loss", low=0)
    balance: str = arg("static", "weights of the tasks", ("static", "uncertainty", "dwa"))


@dataclass(frozen=True)
class OptimArguments:
    """The optimizer and its schedule."""

    optim: str = arg("adamw", "optimizer", ("adamw",))
    learning_rate: float = arg(3e-4, "peak learning rate; if not given, by stage and method", low=0)
    min_lr: float = arg(0.0, "learning rate at the end of the schedule", low=0)
    lr_scheduler_type: str = arg("cosine", "shape of the schedule after warm-up", ("cosine", "linear", "constant"))
    warmup_steps: int = arg(0, "steps of linear warm-up", low=0)
    warmup_ratio: float = arg(0.0, "warm-up as a share of all steps", low=0, high=1)
    weight_decay: float = arg(0.1, "decoupled weight decay", low=0)
    adam_beta1: float = arg(0.9, "decay of the first moment", low=0, high=0.999999)
    adam_beta2: float = arg(0.95, "decay of the second moment", low=0, high=0.999999)
    adam_epsilon: float = arg(1e-8, "added to the denominator", low=0)
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm; 0: never", low=0)
    moe_gate_lr_ratio: float = arg(0.01, "router learning rate over learning_rate", low=0)
    vit_lr_ratio: float = arg(0.9, "vision learning rate over learning_rate", low=0)


@dataclass(frozen=True)
class ComputeArguments:
    """Number format and what is traded for memory."""

    bf16: bool = arg(False, "compute in bfloat16; on a CPU float32 stands in")
    fp16: bool = arg(False, "compute in float16; on a CPU float32 stands in")
    float64: bool = arg(False, "compute in float64: tells rounding from mistakes; slow")
    fp16_opt_level: str = arg("O2", "O1: cast products only; O2: cast parameters too", ("O1", "O2"))
    weight_quantize_algo: str = arg(
        "none",
        "format of the frozen base weights",
        ("none", "weight_only_int8", "weight_only_mix", "nf4", "fp8_linear"),
    )
    recompute: bool = arg(False, "recompute activations in the backward pass")
    recompute_granularity: str = arg("full", "what is recomputed", ("full", "full_attn", "core_attn"))
    recompute_method: str = arg("uniform", "which layers are recomputed", ("uniform", "block"))
    recompute_num_layers: int = arg(1, "layers a unit (uniform) or layers in all (block)", low=1)
    recompute_modules: tuple[str, ...] = arg((), "only these modules; empty: whole layers")


@dataclass(frozen=True)
class EvalArguments:
    """When and on what the model is measured."""

    do_eval: bool = arg(False, "evaluate once at the end")
    eval_strategy: str = arg("no", "when to evaluate", WHEN)
    eval_steps: int = arg(0, "steps between evaluations", low=0)
    per_device_eval_batch_size: int = arg(1, "rows a device", low=1)
    load_best_model_at_end: bool = arg(False, "finish with the best checkpoint")
    metric_for_best_model: str = arg("loss", "metric that names the best checkpoint")
    greater_is_better: bool | None = arg(None, "direction of the metric; null: loss down, others up")
    early_stopping_patience: int = arg(0, "evaluations without progress before stopping; 0: never stop", low=0)
    eval_max_samples: int = arg(64, "held-out rows answered at an evaluation while training; 0: only the loss", low=0)
    report_max_samples: int = arg(300, "held-out rows answered before and after training", low=0)
    eval_max_new_tokens: int = arg(64, "tokens of an answer, at most", low=1)
    eval_metrics: tuple[str, ...] = arg((), "scores of the answers; empty: those that fit the references")
    guard_dataset_path: tuple[str, ...] = arg((), "general rows watched for forgetting")
    guard_tolerance: float = arg(0.02, "alarm when the guard score falls by more than this", low=0)
    guard_stop: bool = arg(False, "stop at the alarm")


@dataclass(frozen=True)
class SaveArguments:
    """What is written where."""

    output_dir: str = arg("./output", "folder of everything that the run writes")
    overwrite_output_dir: bool = arg(
        False, "start anew: what earlier runs left in output_dir is moved to output_dir/earlier-N"
    )
    save_strategy: str = arg("steps", "when to save", WHEN)
    save_steps: int = arg(500, "steps between checkpoints", low=0)
    save_total_limit: int | None = arg(None, "checkpoints kept; null: all", low=1)
    save_only_model: bool = arg(False, "leave out what only resuming needs")
    async_save: bool = arg(False, "write what resuming needs while training goes on; takes memory for a copy of it")
    resume_from_checkpoint: str = arg("auto", "auto: newest in output_dir; no; or a folder")
    resume_only_model: bool = arg(False, "take the weights, start optimizer and data anew")
    ignore_data_skip: bool = arg(False, "on resuming, start the data from the first row")


@dataclass(frozen=True)
class LogArguments:
    """What is told while training. trainer_log.jsonl and metrics.csv are always written."""

    logging_steps: int = arg(1, "steps between log lines", low=1)
    logging_dir: str = arg("", "folder of the report_to writers; empty: output_dir/runs")
    report_to: tuple[str, ...] = arg((), "further writers", ("visualdl", "tensorboard", "wandb", "swanlab", "all"))
    disable_tqdm: bool = arg(False, "plain lines instead of a progress bar")
    plot_loss: bool = arg(True, "draw training_loss.png")


@dataclass(frozen=True)
class ParallelArguments:
    """Degrees of the Fleet mesh."""

    tensor_model_parallel_size: int = arg(1, "tensor parallel degree", low=1)
    pipeline_model_parallel_size: int = arg(1, "pipeline parallel degree", low=1)
    virtual_pipeline_model_parallel_size: int = arg(1, "pipeline chunks a rank", low=1)
    pp_seg_method: tuple[str, ...] = arg(
        (),
        "where the pipeline is cut: uniform, layer:DecoderLayer, first items ([0, 13, 31]) or numbers of layers ([12, 16]); empty: by cost",
    )
    sharding_parallel_size: int = arg(1, "ranks that share optimizer state", low=1)
    sharding: str = arg("off", "what is sharded", SHARDING)
    sequence_parallel: bool = arg(False, "split activations over the tensor parallel ranks")
    context_parallel_size: int = arg(1, "context parallel degree", low=1)
    sep_parallel_size: int = arg(1, "segment parallel degree", low=1)
    expert_model_parallel_size: int = arg(1, "expert parallel degree", low=1)
    expert_tensor_model_parallel_size: int = arg(1, "tensor parallel degree inside an expert", low=1)


@dataclass(frozen=True)
class PreferenceArguments:
    """Objectives that compare answers (methods.md 4.2-4.4). Every stage but SFT and PT."""

    beta: float = arg(0.1, "weight of the distance to the reference", low=0)
    loss_type: tuple[str, ...] = arg(("auto",), "objective, or several, comma separated; auto: that of the stage")
    loss_weights: tuple[float, ...] = arg((), "weights of several objectives; empty: 1 each", low=0)
    label_smoothing: float = arg(0.0, "share of pairs judged wrongly (cdpo, robust, exo_pair)", low=0, high=0.49)
    simpo_gamma: float = arg(0.5, "target margin of SimPO", low=0)
    dpop_lambda: float = arg(50.0, "penalty of DPOP", low=0)
    offset_alpha: float = arg(0.0, "margin from scores, times their difference", low=0)
    offset_type: str = arg("linear", "what of the scores' difference makes the margin", ("linear", "log"))
    ld_alpha: float = arg(1.0, "weight of tokens beyond the shorter answer (LD-DPO)", low=0, high=1)
    f_divergence_type: str = arg("reverse_kl", "distance to the reference", F_DIVERGENCES)
    f_alpha_divergence_coef: float = arg(0.5, "alpha of the alpha_divergence; 1 is reverse_kl, 0 forward_kl")
    use_weighting: bool = arg(False, "weigh pairs by how probable both answers are for the policy (WPO)")
    pref_loss_ratio: float = arg(1.0, "weight of the preference loss", low=0)
    sft_loss_ratio: float = arg(0.0, "weight of the likelihood of the chosen answer", low=0)
    sft_loss_norm: str = arg("token", "what that likelihood is averaged over: tokens, or answers", ("token", "seq"))
    reward_shift_decay: float | None = arg(
        None, "decay of the mean rewards that BCO compares with; null: means over the whole run", low=0, high=0.9999
    )
    max_prompt_len: int = arg(2048, "tokens of the prompt, at most", low=1)
    prefix_sharing: bool = arg(True, "compute what the answers to a prompt have in common once")


@dataclass(frozen=True)
class PictureArguments:
    """Pairs made of a row's own picture: the right answer to the true one over the same answer to a spoilt one (methods.md 4.2). Stages DPO, UPO and RM."""

    image_corruption: str = arg(
        "none", "add pairs whose worse side is the right answer to a grey picture, or to one under noise", CORRUPTIONS
    )
    image_corruption_ratio: float = arg(
        1.0, "share of the training rows with pictures that get such a pair", low=0.0001, high=1
    )
    image_corruption_noise: float = arg(
        0.99, "share of noise in the standard deviation of a spoilt picture; 1: nothing else", low=0.01, high=1
    )


@dataclass(frozen=True)
class ReferenceArguments:
    """The policy that answers are compared with (methods.md 3.4). Stages DPO, KTO and UPO."""

    reference_free: bool = arg(False, "no reference model; only with losses that need none")
    ref_mode: str = arg(
        "auto",
        "where the reference comes from; auto: the adapter's absence or copy, else a copy of the model",
        REF_MODES,
    )
    ref_logps_path: str = arg("", "file of the precomputed reference; empty: output_dir/reference_logps.npz")
    ref_model_update_steps: int = arg(-1, "steps between updates of the reference (TR-DPO); -1: never", low=-1)
    ref_model_mixup_alpha: float = arg(
        0.6, "share of the policy in an updated reference; 1: a copy", low=0.0001, high=1
    )


@dataclass(frozen=True)
class SignalArguments:
    """How each kind of judgement is learned (methods.md 4.3-4.5, 7). Stages KTO, UPO and RM."""

    term_weights: tuple[str, ...] = arg(
        (), "weights of UPO's terms over the preset's, as pair=1,rank=0.5,rate=0.5,bin=0.25,nll=0.1"
    )
    kappa: int = arg(0, "1: implicit rewards per token of the answer (UPO)", low=0, high=1)
    rank_loss: str = arg("plackett_luce", "how rankings are learned", ("plackett_luce", "edges", "lipo_lambda"))
    rate_loss: str = arg("soft_bt", "how ratings are learned", ("soft_bt", "margin", "infonca", "bernoulli_kl"))
    rank_top_k: int | None = arg(None, "best tiers of a ranking that plackett_luce learns; null: all", low=1)
    rate_tau: float = arg(1.0, "softness of soft_bt and bernoulli_kl, in units of the whole scale", low=0.0001)
    rate_margin: str = arg(
        "linear", "what of the scores' difference is the margin of rate_loss margin", ("linear", "log")
    )
    rate_alpha: float = arg(1.0, "factor of that margin; temperature of the scores of infonca", low=0.0001)
    edge_loss: str = arg(
        "sigmoid", "loss of a comparison: sigmoid, or another of DPO's that compares two answers (UPO)"
    )
    bin_loss: str = arg("kto", "how labels are learned", ("kto", "bco", "apo_zero_unpaired"))
    edge_weight: str = arg("unit", "what counts as one: a row, or each comparison in it", ("unit", "edge"))
    desirable_weight: float = arg(1.0, "weight of good answers (KTO)", low=0)
    undesirable_weight: float = arg(1.0, "weight of bad answers (KTO)", low=0)
    bco_density: bool = arg(
        False, "weigh bad answers by how like those of good ones their prompts are (BCO's distribution matching)"
    )
    bco_density_min: float = arg(0.5, "least such weight", low=0)
    bco_density_max: float = arg(10.0, "largest such weight", low=0)
    rating_loss: str = arg(
        "pairs",
        "how ratings teach a reward model: by comparison, as its values, or as levels between learned cuts (RM)",
        ("pairs", "regression", "ordinal"),
    )
    rating_levels: int = arg(5, "values that ratings have, evenly spaced (rating_loss ordinal)", low=2)
    center_rewards_coefficient: float = arg(0.01, "pull of rewards towards 0 (RM)", low=0)
    allow_base: bool = arg(False, "let UPO start from a model without an SFT ancestor")


@dataclass(frozen=True)
class RolloutArguments:
    """Sampled answers and their rewards (methods.md 4.6-4.7). Stages UPO, RLVR, PPO."""

    num_generations: int = arg(8, "answers sampled a prompt", low=1)
    max_completion_length: int = arg(512, "tokens sampled an answer, at most", low=1)
    temperature: float = arg(1.0, "sampling temperature", low=0.01)
    top_p: float = arg(1.0, "nucleus that is sampled from", low=0.01, high=1)
    epsilon: float = arg(0.2, "lower clip of the probability ratio", low=0)
    epsilon_high: float = arg(0.2, "upper clip of the probability ratio", low=0)
    reward_funcs: tuple[str, ...] = arg((), "rewards, comma separated; empty: what each row names")
    reward_weights: tuple[float, ...] = arg((), "one weight a reward")
    num_iterations: int = arg(1, "updates from one batch of answers", low=1)


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: no setting is missing and none depends on how it was spelled."""

    data: DataArguments = DataArguments()
    media: MediaArguments = MediaArguments()
    model: ModelArguments = ModelArguments()
    lora: LoraArguments = LoraArguments()
    added: AddedArguments = AddedArguments()
    freeze: FreezeArguments = FreezeArguments()
    train: TrainArguments = TrainArguments()
    optim: OptimArguments = OptimArguments()
    compute: ComputeArguments = ComputeArguments()
    eval: EvalArguments = EvalArguments()
    save: SaveArguments = SaveArguments()
    log: LogArguments = LogArguments()
    parallel: ParallelArguments = ParallelArguments()
    preference: PreferenceArguments = PreferenceArguments()
    picture: PictureArguments = PictureArguments()
    reference: ReferenceArguments = ReferenceArguments()
    signals: SignalArguments = SignalArguments()
    rollout: RolloutArguments = RolloutArguments()

    def applies(self, section: str) -> bool:
        """Whether the settings of `section` have an effect at this stage and method."""
        if section == "lora":
            return self.model.fine_tuning == "LoRA"
        if section == "added":
            return self.model.fine_tuning in ADDED
        if section in ("preference", "reference"):
            return self.model.stage not in ("SFT", "PT")
        if section == "picture":
            return self.model.stage in ("DPO", "KTO", "UPO", "RM")
        if section == "signals":
            return self.model.stage in ("KTO", "UPO", "RM")
        return section != "rollout" or self.model.stage in ("UPO", "RLVR", "PPO")

    def flat(self) -> dict[str, Any]:
        """Every setting by name."""
        return {name: vars(vars(self)[s.section])[name] for name, s in SETTINGS.items()}


@dataclass(frozen=True)
class Setting:
    """One field as the loader needs it. `kind` is the type of a value, or of each value if `many`."""

    name: str
    section: str
    kind: type
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None


def _settings() -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for section, cls in typing.get_type_hints(RunConfig).items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint, many = hints[f.name], typing.get_origin(hints[f.name]) is tuple
            kind = typing.get_args(hint)[0] if many or isinstance(hint, types.UnionType) else hint
            found[f.name] = Setting(f.name, section, kind, many, f.default, **f.metadata)
    return found


SETTINGS = _settings()


def build(values: dict[str, Any]) -> RunConfig:
    """The configuration with these settings; the others, and those of sections without effect, at their defaults. Values are converted, names ours."""
    classes = typing.get_type_hints(RunConfig)
    chosen: dict[str, dict[str, Any]] = {section: {} for section in classes}
    for name, value in values.items():
        chosen[SETTINGS[name].section][name] = value
    config = RunConfig(**{section: cls(**chosen[section]) for section, cls in classes.items()})
    return dataclasses.replace(
        config, **{section: cls() for section, cls in classes.items() if not config.applies(section)}
    )
