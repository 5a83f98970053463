"""Losses, gradients and metrics of TRL's own trainers on drawn log-probabilities: what
tests/objectives/test_trl_parity.py compares with.

    pip install torch==2.13.0 transformers==5.23.0 peft trl==1.16.0
    python tests/golden/make_trl_preference.py          # seconds; the same numbers each time

TRL's methods run as they are; only the model (which would give log-probabilities) and the
accelerator are stand-ins. The tables below are the cases; the test reads them from here and needs
neither torch nor TRL.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("trl_preference.npz")
PAIRS, LONGEST = 6, 9

# case -> what TRL's DPO trainer is given; loss_types and loss_weights of more than one entry are
# sums.
DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_types": ["sigmoid"]},
    "sigmoid_beta": {"loss_types": ["sigmoid"], "beta": 0.7},
    "hinge": {"loss_types": ["hinge"], "beta": 0.5},
    "ipo": {"loss_types": ["ipo"]},
    "exo_pair": {"loss_types": ["exo_pair"], "label_smoothing": 0.05},
    "nca_pair": {"loss_types": ["nca_pair"]},
    "robust": {"loss_types": ["robust"], "label_smoothing": 0.2},
    "bco_pair": {"loss_types": ["bco_pair"]},
    "sppo_hard": {"loss_types": ["sppo_hard"]},
    "apo_zero": {"loss_types": ["apo_zero"]},
    "apo_down": {"loss_types": ["apo_down"]},
    "sft": {"loss_types": ["sft"]},
    "sigmoid_norm": {"loss_types": ["sigmoid_norm"], "beta": 2.0},
    "mpo": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "rpo": {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "ld": {"loss_types": ["sigmoid"], "ld_alpha": 0.3},
    "ld_zero_apo": {"loss_types": ["apo_zero"], "ld_alpha": 0.0},
    "forward_kl": {"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "js": {"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "js_ipo": {"loss_types": ["ipo"], "f_divergence_type": "js_divergence"},
    "wpo": {"loss_types": ["sigmoid"], "use_weighting": True},
    # TRL's hinge fails when weighted
    "wpo_ld_ipo": {"loss_types": ["ipo"], "use_weighting": True, "ld_alpha": 0.5},
}
ALPHA_CASES = {"alpha_half": 0.5, "alpha_two": 2.0, "alpha_one": 1.0}  # TRL has no float64 here
CPO_CASES = {
    "cpo": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0},
    "orpo": {"beta": 0.3},
}
KTO_CASES = {
    "kto": {"loss_type": "kto", "undesirable_weight": 1.33},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5},
}
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def inputs() -> dict[str, np.ndarray]:
    """Token log-probabilities of 2P answers (all chosen, then all rejected), 0 beyond their
    lengths.
    """
    generator = np.random.default_rng(20)
    length_C = generator.integers(1, LONGEST + 1, 2 * PAIRS)
    length_C[:3] = [1, LONGEST, 4]
    mask_CL = np.arange(LONGEST)[None] < length_C[:, None]
    logp_CL = -generator.gamma(1.5, 0.6, mask_CL.shape) * mask_CL
    ref_CL = np.minimum(logp_CL + generator.normal(0, 0.4, mask_CL.shape), -1e-3) * mask_CL
    square_CL = -generator.gamma(1.2, 0.5, mask_CL.shape) * mask_CL
    mismatched = np.stack([-generator.gamma(6, 1.0, PAIRS), -generator.gamma(7, 1.0, PAIRS)])
    rewards_C = generator.normal(0, 1.5, 2 * PAIRS)
    margin_P = generator.uniform(0, 1, PAIRS)
    return {
        "length_C": length_C,
        "logp_CL": logp_CL,
        "ref_CL": ref_CL,
        "square_CL": square_CL,
        "mismatched_2M": mismatched,
        "rewards_C": rewards_C,
        "margin_P": margin_P,
    }


def _accelerator() -> SimpleNamespace:
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same, autocast=contextlib.nullcontext)


def _stand_in(**more: Any) -> SimpleNamespace:
    """What the trainers' methods read of `self`."""
    import torch

    return SimpleNamespace(
        model=torch.nn.Module(),
        accelerator=_accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, **more.pop("args", {})),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def _model(logp: Any, square: Any) -> Any:
    import torch

    zero = torch.zeros_like(logp)
    out = SimpleNamespace(
        log_probs=logp, log_sum_sq_probs=square, entropy=zero, mean_logits=zero, is_top1=zero.bool(), aux_loss=None
    )
    return lambda **_: out


def dpo_case(data: dict[str, np.ndarray], case: dict[str, Any], dtype: str = "float64") -> dict[str, np.ndarray]:
    import torch
    from trl.trainer import dpo_trainer

    dpo_trainer.disable_gradient_checkpointing = lambda *_: contextlib.nullcontext()
    logp = torch.tensor(data["logp_CL"], dtype=getattr(torch, dtype), requires_grad=True)
    ref, square = (torch.tensor(data[k], dtype=logp.dtype) for k in ("ref_CL", "square_CL"))
    mask = torch.nn.functional.pad(torch.tensor(np.arange(LONGEST)[None] < data["length_C"][:, None]).long(), (1, 0))
    settings = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "loss_weights": [1.0] * len(case["loss_types"]),
        **case,
    }
    trainer = _stand_in(**settings, ref_model=_model(ref, square))
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, _model(logp, square), batch, False)
    loss.backward()
    metrics = np.array([trainer._metrics["train"][name][0] for name in METRICS])
    return {"loss": loss.detach().numpy(), "grad_CL": logp.grad.numpy(), "metrics": metrics}


def cpo_case(data: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The loss as TRL's CPO and ORPO trainers put it together around their preference term."""
    import torch
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    case = dict(CPO_CASES[name])
    logp = torch.tensor(data["logp_CL"], requires_grad=True)
    length = torch.tensor(data["length_C"])
    sums = logp.sum(1) if name == "cpo" else logp.sum(1) / length
    chosen, rejected = sums.chunk(2)
    nll = -logp[:PAIRS].sum() / length[:PAIRS].sum()
    if name == "orpo":
        trainer = SimpleNamespace(accelerator=_accelerator(), beta=case["beta"])
        losses = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
        loss = nll - losses.mean()
    else:
        trainer = SimpleNamespace(
            accelerator=_accelerator(), alpha=0.0, label_smoothing=0.0, **{"simpo_gamma": 0.0, **case}
        )
        losses = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
        loss = losses.mean() + case["cpo_alpha"] * nll
    loss.backward()
    return {"loss": loss.detach().numpy(), "grad_CL": logp.grad.numpy()}


def kto_case(data: dict[str, np.ndarray], case: dict[str, Any]) -> dict[str, np.ndarray]:
    import torch
    from trl.trainer import kto_trainer

    kto_trainer.disable_gradient_checkpointing = lambda *_: contextlib.nullcontext()
    logp = torch.tensor(data["logp_CL"], requires_grad=True)
    ref = torch.tensor(data["ref_CL"])
    mismatched = torch.tensor(data["mismatched_2M"])
    mask = torch.nn.functional.pad(torch.tensor(np.arange(LONGEST)[None] < data["length_C"][:, None]).long(), (1, 0))
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor([1] * PAIRS + [0] * PAIRS),
    }
    settings = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **case}
    reference = _model(ref, ref)
    trainer = _stand_in(**settings, calculate_KL=case["loss_type"] == "kto", ref_model=reference)
    trainer._compute_kl_logps = lambda model, _: mismatched[int(model is reference)]
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, _model(logp, ref), batch, False)
    loss.backward()
    kl = np.array(trainer._metrics["train"]["kl"][0])
    return {"loss": loss.detach().numpy(), "grad_CL": logp.grad.numpy(), "kl": kl}


def reward_case(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch
    from trl.trainer.reward_trainer import RewardTrainer

    reward = torch.tensor(data["rewards_C"], requires_grad=True)
    trainer = _stand_in(args={"center_rewards_coefficient": 0.02})
    batch = {"margin": torch.tensor(data["margin_P"]), "attention_mask": torch.ones(1)}
    output = SimpleNamespace(logits=reward.unsqueeze(-1))
    loss = RewardTrainer.compute_loss(trainer, lambda **_: output, batch)
    loss.backward()
    metrics = np.array([trainer._metrics["train"][k][0] for k in ("accuracy", "margin", "mean_reward")])
    return {"loss": loss.detach().numpy(), "grad_C": reward.grad.numpy(), "metrics": metrics}


def main() -> None:
    data = inputs()
    out: dict[str, dict[str, np.ndarray]] = {name: dpo_case(data, case) for name, case in DPO_CASES.items()}
    for name, alpha in ALPHA_CASES.items():
        case = {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        out[name] = dpo_case(data, case, "float32")
    out |= {name: cpo_case(data, name) for name in CPO_CASES}
    out |= {name: kto_case(data, case) for name, case in KTO_CASES.items()}
    out["reward"] = reward_case(data)
    arrays = {f"{case}/{key}": value for case, values in out.items() for key, value in values.items()}
    np.savez_compressed(FILE, **{f"input/{k}": v for k, v in data.items()}, **arrays)
    for name, values in out.items():
        print(f"{name:20s} {float(values['loss']):.10f}")


if __name__ == "__main__":
    main()
