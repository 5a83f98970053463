"""What a method asks of the settings: its losses, its pairs, its reference, its rows. The rules
that `checks.problems` applies beside the general ones.

Refuses to know: where settings were written, how to convert them, whether paths exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ernie_tune.config.arguments import SAMPLING, SETTINGS, RunConfig
from ernie_tune.config.convert import did_you_mean
from ernie_tune.config.language import say
from ernie_tune.config.stages import (
    EDGE_LOSSES,
    PAIR_LOSSES,
    ROW_PRESETS,
    STAGES,
    UNREFERENCED,
    UPO_SAMPLED_TERMS,
    UPO_TERMS,
)


def weights_problem(c: RunConfig) -> tuple[str, str] | None:
    """(setting, why) where the weights of rewards are not as many as the rewards that settings
    name; None where they are.
    """
    weights = len(c.rollout.reward_weights)
    rewards = len(c.rollout.reward_funcs) + bool(c.critic.reward_model)
    if not c.samples or weights in (0, rewards):
        return None
    return (
        "reward_weights",
        say(
            f"reward_weights ({weights} values) must have one value a reward ({rewards}); match them",
            f"reward_weights（{weights} 个）须与奖励一一对应（{rewards} 个）；请使个数一致",
        ),
    )


def _stage(c: RunConfig) -> Iterator[tuple[str, str]]:
    rewards = len(c.rollout.reward_funcs) + bool(c.critic.reward_model)
    prompt, longest = c.preference.max_prompt_len, c.data.max_seq_len
    if c.applies("preference") and prompt >= longest and prompt != SETTINGS["max_prompt_len"].default:
        yield (
            "max_prompt_len",
            say(
                f"max_prompt_len ({prompt}) must be below max_seq_len ({longest}); lower it",
                f"max_prompt_len（{prompt}）须小于 max_seq_len（{longest}）；请调小",
            ),
        )
    yield from _kto_rows(c)
    yield from _dealt_rows(c)
    if c.samples and c.data.packing:
        yield (
            "packing",
            say(
                f"packing (true) must be false at stage {c.model.stage}, where answers are sampled; unset it",
                f"{c.model.stage} 阶段要采样回答，packing（true）须为 false；请取消",
            ),
        )
    problem = weights_problem(c)
    if problem and rewards:  # functions at hand are counted where they are given
        yield problem


def _dealt_rows(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Router losses are means over micro-batches, so another cut would be another loss."""
    t = c.train
    coefficients = ("router_aux_loss_coef", "router_z_loss_coef", "moe_orthogonal_loss_lambda")
    given = next((name for name in coefficients if getattr(t, name)), None)
    if t.auto_find_batch_size and given:
        yield (
            "auto_find_batch_size",
            say(
                f"auto_find_batch_size (true) must go without {given} ({getattr(t, given):g}), a mean over micro-batches; "
                "set it to 0, or write per_device_train_batch_size yourself",
                f"{given}（{getattr(t, given):g}）按微批取平均，auto_find_batch_size（true）不能与之同用；请设为 0，"
                "或自行写出 per_device_train_batch_size",
            ),
        )


def _kto_rows(c: RunConfig) -> Iterator[tuple[str, str]]:
    """KTO's baseline compares the answers of a step with one another's prompts (2402.01306): one
    row alone has no other.
    """
    t, name = c.train, "per_device_train_batch_size"
    learned = c.preference.loss_type[0] in ("auto", "kto")
    rows = t.per_device_train_batch_size * t.gradient_accumulation_steps * c.parallel.sharding_parallel_size
    if c.model.stage == "KTO" and learned and rows < 2:
        yield (
            name,
            say(
                f"{name} ({t.per_device_train_batch_size}) must be at least 2 at stage KTO, whose "
                "baseline compares the answers of a step with one another; raise it or "
                "gradient_accumulation_steps, or set loss_type: apo_zero_unpaired",
                f"KTO 阶段的基线要在一步之内比较不同回答，{name}（{t.per_device_train_batch_size}"
                "）须至少为 2；请调大它或 gradient_accumulation_steps，或设 loss_type: apo_zero_unpaired",
            ),
        )
    if (
        c.model.fine_tuning in ("Prompt", "PTuning", "Prefix")
        and STAGES[c.model.stage].compares
        and c.preference.prefix_sharing
    ):
        yield (
            "prefix_sharing",
            say(
                f"prefix_sharing (true) must be false with fine_tuning {c.model.fine_tuning}: virtual "
                "tokens begin every dialogue; set it",
                f"fine_tuning {c.model.fine_tuning} 时每段对话以虚拟 token "
                "开头，prefix_sharing（true）须为 false；请设置",
            ),
        )


def _losses(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Names in `loss_type` and `edge_loss` (`objectives` computes them), and the reference that
    they need.
    """
    stage, names = STAGES[c.model.stage], c.preference.loss_type
    if not (stage.compares or stage.samples):
        return
    several = stage.name == "DPO"
    known = stage.losses if several or len(names) == 1 else ()
    if names != ("auto",):
        for name in names if known else (",".join(names),):
            yield from _loss_name(stage.name, name, stage.losses)
    if not stage.compares:
        return
    referenced = {name not in UNREFERENCED for name in names if name in PAIR_LOSSES and name != "sft"}
    shown = ",".join(names)
    if several and len(referenced) > 1:
        yield (
            "loss_type",
            say(
                f"loss_type ({shown}) must not mix losses with and without a reference; split the run or drop one",
                f"loss_type（{shown}）不能混用有参考与无参考的损失；请分开运行，或去掉其一",
            ),
        )
    elif several and referenced != {False} and names != ("sft",):
        if c.reference.reference_free:
            yield (
                "reference_free",
                say(
                    f"reference_free (true) must go with losses without a reference, not loss_type {shown}; "
                    "take simpo, orpo or cpo",
                    f"reference_free（true）须与不用参考模型的损失同用，不能是 loss_type {shown}；请用 "
                    "simpo、orpo 或 cpo",
                ),
            )
        if c.reference.ref_mode == "none":
            yield (
                "ref_mode",
                say(
                    f"ref_mode (none) must not go with loss_type {shown}, which compares with a reference; "
                    "set auto, or take simpo, orpo or cpo",
                    f"loss_type {shown} 要与参考模型比较，不能用 ref_mode（none）；请设为 auto，或用 simpo、orpo、cpo",
                ),
            )
    if stage.name == "KTO" and c.reference.ref_mode == "none":
        yield (
            "ref_mode",
            say(
                "ref_mode (none) must be another at stage KTO, whose losses compare with a reference; set auto",
                "KTO 阶段的损失要与参考模型比较，ref_mode 不能为 none；请设 auto",
            ),
        )
    if stage.name == "UPO":
        yield from _loss_name("UPO", c.signals.edge_loss, EDGE_LOSSES, "edge_loss")
        yield from _term_weights(c)
        yield from _pair_weight(c)


def _term_weights(c: RunConfig) -> Iterator[tuple[str, str]]:
    known = upo_terms(c)
    for item in c.signals.term_weights:
        term, _, number = item.partition("=")
        if term.strip() not in known or not re.fullmatch(r"\s*\d*\.?\d+(e[+-]?\d+)?\s*", number):
            yield (
                "term_weights",
                say(
                    f"term_weights ({item!r}) must look like term=weight, term one of {', '.join(known)}; "
                    f"e.g. {known[0]}=1,{known[1]}=0.5",
                    f"term_weights（{item!r}）须写成 term=weight，term 为 {', '.join(known)} 之一；例如 "
                    f"{known[0]}=1,{known[1]}=0.5",
                ),
            )


def upo_terms(c: RunConfig) -> tuple[str, ...]:
    """The terms that the run's preset of UPO can weigh."""
    sampled = UPO_SAMPLED_TERMS if c.samples else ()
    rows = not sampled or set(c.preference.loss_type) & set(ROW_PRESETS)
    return tuple(dict.fromkeys((*sampled, *(UPO_TERMS if rows else ()))))


def _critic(c: RunConfig) -> Iterator[tuple[str, str]]:
    """A critic where nothing makes one, and settings of one that is not there."""
    stage, asked = c.model.stage, c.policy.advantage_estimator
    if stage == "RLVR" and asked == "gae":
        yield (
            "advantage_estimator",
            say(
                "advantage_estimator (gae) must be another at stage RLVR, which has no critic; take stage PPO, or grpo",
                "RLVR 阶段没有价值网络，advantage_estimator（gae）须为其他；请用 PPO 阶段，或 grpo",
            ),
        )
    if stage != "UPO" or not c.samples or asked == "gae":
        return
    flat = c.flat()
    for name, setting in SETTINGS.items():
        if setting.section == "critic" and name != "reward_model" and flat[name] != setting.default:
            yield (
                name,
                say(
                    f"{name} ({flat[name]}) must go with advantage_estimator gae, not {asked}; set one",
                    f"{name}（{flat[name]}）须与 advantage_estimator gae 同用，而不是 {asked}；请设置其一",
                ),
            )


def _pair_weight(c: RunConfig) -> Iterator[tuple[str, str]]:
    given = c.pairs.pair_weight
    if given != "auto" and not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", given):
        yield (
            "pair_weight",
            say(
                f"pair_weight ({given}) must be a number, or auto; 1.0 is usual",
                f"pair_weight（{given}）须为数值或 auto；通常为 1.0",
            ),
        )


def _loss_name(stage: str, name: str, known: tuple[str, ...], setting: str = "loss_type") -> Iterator[tuple[str, str]]:
    if name in known:
        return
    if name == "kto_pair":
        yield (
            setting,
            say(
                f"{setting} (kto_pair) must be another: it compares with means of the whole batch; take "
                "stage KTO on labels, or bco_pair",
                f"{setting}（kto_pair）不可用：它要与整个批次的均值比较；请在标签数据上用 KTO 阶段，或用 bco_pair",
            ),
        )
    elif not known:
        yield (
            setting,
            say(
                f"{setting} ({name}) must be auto at stage {stage}; remove it",
                f"{stage} 阶段 {setting}（{name}）须为 auto；请去掉",
            ),
        )
    elif set(name.split(",")) <= set(known):  # several, of which each alone would do
        yield (
            setting,
            say(
                f"{setting} ({name}) must be one of {', '.join(known)} at stage {stage}; choose one",
                f"{stage} 阶段 {setting}（{name}）须为 {', '.join(known)} 之一；请选其一",
            ),
        )
    else:
        yield (
            setting,
            say(
                f"{setting} ({name}) must be one of {', '.join(known)} at stage {stage}"
                f"{did_you_mean(name, known)}; correct the name",
                f"{stage} 阶段 {setting}（{name}）须为 {', '.join(known)} 之一{did_you_mean(name, known)}；请改正名称",
            ),
        )


def _compared(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of comparisons that this stage, its loss or another setting does not read."""
    if not STAGES[c.model.stage].compares:
        return
    flat, p = c.flat(), c.preference
    at_upo = c.model.stage == "UPO"
    compared = ("edge_loss", (c.signals.edge_loss,)) if at_upo else ("loss_type", p.loss_type)
    for name, setting in SETTINGS.items():
        about = setting.about
        if flat[name] == setting.default or not any(STAGES[stage].compares for stage in about.stages):
            continue
        asked = ("pg_loss", (c.pairs.pg_loss,)) if setting.section in SAMPLING else compared
        if c.model.stage not in about.stages:
            yield (
                name,
                say(
                    f"{name} ({flat[name]}) has no effect at stage {c.model.stage}, only at "
                    f"{', '.join(about.stages)}; remove it",
                    f"{name}（{flat[name]}）在 {c.model.stage} 阶段无效，仅用于 {', '.join(about.stages)}；请去掉",
                ),
            )
        elif about.losses and not set(about.losses) & set(asked[1]):
            yield (
                name,
                say(
                    f"{name} ({flat[name]}) must go with {asked[0]} {' or '.join(about.losses)}, not "
                    f"{','.join(asked[1])}; set one",
                    f"{name}（{flat[name]}）须与 {asked[0]} {' or '.join(about.losses)} 同用，而不是 "
                    f"{','.join(asked[1])}；请设置其一",
                ),
            )
        elif about.needs and flat[about.needs[0]] not in about.needs[1]:
            other, values = about.needs
            yield (
                name,
                say(
                    f"{name} ({flat[name]}) must go with {other} {' or '.join(values)}, not {flat[other]}; set one",
                    f"{name}（{flat[name]}）须与 {other} {' or '.join(values)} 同用，而不是 {flat[other]}；请设置其一",
                ),
            )
    if p.loss_weights and len(p.loss_weights) != len(p.loss_type):
        yield (
            "loss_weights",
            say(
                f"loss_weights ({len(p.loss_weights)} values) must have one value a loss_type ("
                f"{len(p.loss_type)}); match them",
                f"loss_weights（{len(p.loss_weights)} 个）须与 loss_type 一一对应（{len(p.loss_type)} "
                "个）；请使个数一致",
            ),
        )
    if "exo_pair" in compared[1] and not p.label_smoothing:
        yield (
            compared[0],
            say(
                f"{compared[0]} (exo_pair) needs label_smoothing above 0: its target is (1 - eps, eps); set 0.001",
                f"{compared[0]}（exo_pair）需要 label_smoothing 大于 0：其目标为 (1 - eps, eps)；请设为 0.001",
            ),
        )
    if p.offset_type != "linear" and not p.offset_alpha:
        yield (
            "offset_type",
            say(
                f"offset_type ({p.offset_type}) must go with offset_alpha above 0; set it",
                f"offset_type（{p.offset_type}）须与大于 0 的 offset_alpha 同用；请设置",
            ),
        )
    if c.lora.lora_dropout:
        yield (
            "lora_dropout",
            say(
                f"lora_dropout ({c.lora.lora_dropout:g}) must be 0 at stage {c.model.stage}: answers are "
                "compared without dropout; remove it",
                f"{c.model.stage} 阶段比较回答时不用 dropout，lora_dropout（{c.lora.lora_dropout:g}）须为 0；请去掉",
            ),
        )


def _density(c: RunConfig) -> Iterator[tuple[str, str]]:
    s, flat = c.signals, c.flat()
    if c.model.stage not in ("KTO", "UPO"):
        return
    learned = ("bin_loss", s.bin_loss) if c.model.stage == "UPO" else ("loss_type", ",".join(c.preference.loss_type))
    if s.bco_density and learned[1] != "bco":
        yield (
            "bco_density",
            say(
                f"bco_density (true) must go with {learned[0]} bco, not {learned[1]}; set one",
                f"bco_density（true）须与 {learned[0]} bco 同用，而不是 {learned[1]}；请修改其一",
            ),
        )
    for name in ("bco_density_min", "bco_density_max"):
        if not s.bco_density and flat[name] != SETTINGS[name].default:
            yield (
                name,
                say(
                    f"{name} ({flat[name]:g}) must go with bco_density: true; set it",
                    f"{name}（{flat[name]:g}）须与 bco_density: true 同用；请设置",
                ),
            )
    if s.bco_density_min > s.bco_density_max:
        yield (
            "bco_density_min",
            say(
                f"bco_density_min ({s.bco_density_min:g}) must not exceed bco_density_max ("
                f"{s.bco_density_max:g}); lower it",
                f"bco_density_min（{s.bco_density_min:g}）不能超过 bco_density_max（{s.bco_density_max:g}）；请调小",
            ),
        )


def _reference(c: RunConfig) -> Iterator[tuple[str, str]]:
    p, m = c.reference, c.model
    if not (STAGES[m.stage].compares and STAGES[m.stage].reference):
        return
    if p.ref_logps_path and p.ref_mode != "precomputed":
        yield (
            "ref_logps_path",
            say(
                f"ref_logps_path ({p.ref_logps_path}) must go with ref_mode precomputed, not {p.ref_mode}; set it",
                f"ref_logps_path（{p.ref_logps_path}）须与 ref_mode precomputed 同用，而不是 {p.ref_mode}；请设置",
            ),
        )
    if p.reference_free and p.ref_mode not in ("auto", "none"):
        yield (
            "reference_free",
            say(
                f"reference_free (true) must go with ref_mode none, not {p.ref_mode}; keep one",
                f"reference_free（true）须与 ref_mode none 同用，而不是 {p.ref_mode}；请保留其一",
            ),
        )
    if p.ref_mode.startswith("adapter") and m.fine_tuning in ("Full", "Freeze"):
        yield (
            "ref_mode",
            say(
                f"ref_mode ({p.ref_mode}) must go with adapters, not fine_tuning {m.fine_tuning}; set "
                "model or precomputed",
                f"ref_mode（{p.ref_mode}）须与适配器同用，而不是 fine_tuning {m.fine_tuning}；请设为 "
                "model 或 precomputed",
            ),
        )
    if p.ref_mode == "model" and m.fine_tuning not in ("Full", "Freeze"):
        yield (
            "ref_mode",
            say(
                "ref_mode (model) must go with a model that is trained itself, not fine_tuning "
                f"{m.fine_tuning}; set adapter_off or adapter_ref",
                f"ref_mode（model）须用于训练模型本身，而不是 fine_tuning {m.fine_tuning}；请设 "
                "adapter_off 或 adapter_ref",
            ),
        )
    if p.ref_mode == "precomputed" and m.stage == "KTO" and c.preference.loss_type[0] in ("auto", "kto"):
        yield (
            "ref_mode",
            say(
                "ref_mode (precomputed) must not go with kto, whose mismatched answers are not known "
                "before; set auto, or loss_type bco or apo_zero_unpaired",
                "ref_mode（precomputed）不能与 kto 同用，其错配回答事先未知；请设 auto，或 loss_type "
                "bco、apo_zero_unpaired",
            ),
        )
    moving = p.ref_model_update_steps > 0
    if moving and p.ref_mode in ("adapter_off", "precomputed", "none"):
        yield (
            "ref_model_update_steps",
            say(
                f"ref_model_update_steps ({p.ref_model_update_steps}) must go with a reference that has "
                f"weights of its own, not ref_mode {p.ref_mode}; set model or adapter_ref",
                f"ref_model_update_steps（{p.ref_model_update_steps}）要求参考模型有自己的权重，不能是 "
                f"ref_mode {p.ref_mode}；请设为 model 或 adapter_ref",
            ),
        )
    if not moving and p.ref_model_mixup_alpha != SETTINGS["ref_model_mixup_alpha"].default:
        yield (
            "ref_model_mixup_alpha",
            say(
                f"ref_model_mixup_alpha ({p.ref_model_mixup_alpha}) must go with ref_model_update_steps "
                "above 0; set it",
                f"ref_model_mixup_alpha（{p.ref_model_mixup_alpha}）须与大于 0 的 ref_model_update_steps 同用；请设置",
            ),
        )


METHOD_RULES = (_stage, _critic, _compared, _density, _reference, _losses)
