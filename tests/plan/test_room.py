"""plan/room.py: micro-batches and kept layers grow with what is free, and never beyond it."""

from __future__ import annotations

import pytest
from planning import ATTENTION, B28, settings
from support.packed_shapes import packed_shape

from ernie_tune.config.layout import Layout
from ernie_tune.models.presets import preset
from ernie_tune.plan.cards import card
from ernie_tune.plan.job import Job, job_of
from ernie_tune.plan.memory import memory
from ernie_tune.plan.room import FOR_OTHERS_BYTES, KEPT_SHARE, ROWS_SHARE, fitting_rows, kept_layers

GB = 10**9


def quantised(**more: object) -> Job:
    config = settings(B28, **ATTENTION, weight_quantize_algo="weight_only_mix", recompute=True, **more)
    return job_of(config, preset(B28), on_cpu=True)


def test_rows_grow_with_memory_and_divide_the_step() -> None:
    job = quantised(max_seq_len=512, gradient_accumulation_steps=12)
    found = [fitting_rows(job, gigabytes * GB) for gigabytes in (5, 21, 24, 30, 60, 500)]
    assert found[0] == 1, "where nothing fits the run's own check speaks"
    assert found == sorted(found)
    assert found[-1] == 12
    assert len(set(found)) > 2
    assert all(12 % rows == 0 for rows in found)
    for rows, gigabytes in zip(found[1:], (21, 24, 30, 60, 500), strict=True):
        if rows > 1:
            dealt = job.replace(rows=rows, accumulation=12 // rows, visual_tokens=rows * job.visual_tokens)
            assert memory(dealt, Layout(), card("cpu")).total <= ROWS_SHARE * gigabytes * GB


def test_large_micro_batches_are_cut_where_they_do_not_fit() -> None:
    job = quantised(max_seq_len=2048, per_device_train_batch_size=8)
    assert fitting_rows(job, 24 * GB) < 8
    assert fitting_rows(job, 500 * GB) == 8


def test_codes_of_a_file_take_no_room() -> None:
    packed = quantised(max_seq_len=512, gradient_accumulation_steps=8).replace(
        quantize="none", packed=packed_shape(preset(B28))
    )
    assert fitting_rows(packed, 12 * GB) > fitting_rows(
        packed.replace(packed=None, quantize="weight_only_mix"), 12 * GB
    )


def test_layers_are_kept_while_they_fit_half() -> None:
    job = quantised(max_seq_len=4096)
    counts = [kept_layers(job, 512, 0, gigabytes * GB)[0] for gigabytes in (0, 3, 6, 8, 100)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 28
    assert 0 < counts[2] < 28
    assert kept_layers(job, 128, 0, 6 * GB)[0] > counts[2] > kept_layers(job, 1024, 0, 6 * GB)[0]
    for gigabytes in (3, 6, 8):
        room = max(0.0, gigabytes * GB - FOR_OTHERS_BYTES)
        assert kept_layers(job, 512, 0, gigabytes * GB)[1] <= KEPT_SHARE * room
    # a run that nearly fills a machine of 24 GB keeps some layers of short rows, and not all
    assert 0 < kept_layers(job, 101, 0, 5 * GB)[0] < 28


def test_codes_alone_keep_neither_input_nor_product() -> None:
    def kept(**lora: str) -> float:
        config = settings(
            B28, **{**ATTENTION, **lora}, weight_quantize_algo="weight_only_mix", recompute=False, max_seq_len=100
        )
        job = job_of(config, preset(B28), on_cpu=True, visual_tokens=0)
        return memory(job, Layout(), card("cpu")).items["kept activations"]

    model = preset(B28)
    assert model.moe is not None
    inner, shared = model.moe.intermediate_size[0], model.moe.shared_intermediate_size
    sparse, dense = len(model.moe.layer_indices), model.num_hidden_layers - len(model.moe.layer_indices)
    experts = kept(lora_experts="both") - kept()
    assert experts == pytest.approx(4 * 100 * model.moe.top_k * sparse * (model.hidden_size + 2 * inner))
    linear = kept(lora_target_modules="all") - kept()
    assert linear == pytest.approx(4 * 100 * 2 * (sparse * shared + dense * model.intermediate_size))


def test_a_layer_keeps_less_of_pictures() -> None:
    job = quantised(max_seq_len=4096)  # their experts are narrower
    (shown, bytes_shown), (text, bytes_text) = (kept_layers(job, 512, v, 8 * GB) for v in (256, 0))
    assert bytes_shown / shown < 0.95 * bytes_text / text
