"""Each known mistake of conversion is provoked, and named."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.cli import app
from llama_mcore.convert.diagnose import _as_text, diagnose
from llama_mcore.convert.formats import huggingface, native
from llama_mcore.convert.fused_weights import interleaved, join_qkv, split
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.model.config import ModelConfig, RopeScaling
from tests.convert.invented import SHAPES, Invented

MODEL = SHAPES["gqa"]
QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.1.self_attention.linear_proj.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
LAYERS = range(MODEL.num_layers)


def unpermuted(weights: Invented) -> Invented:
    changed = {}
    for layer in LAYERS:
        q, k, v = split(QKV.format(layer), weights.full(QKV.format(layer)), MODEL)
        changed[QKV.format(layer)] = join_qkv(interleaved(q, 4), interleaved(k, 2), v, MODEL)
    return replace(weights, changed=changed)


def only_q_unpermuted(weights: Invented) -> Invented:
    q, k, v = split(QKV, weights.full(QKV.format(0)), MODEL)
    return replace(weights, changed={QKV.format(0): join_qkv(interleaved(q, 4), k, v, MODEL)})


def exchanged(weights: Invented) -> Invented:
    return replace(weights, changed={FC1: torch.cat(weights.full(FC1).chunk(2)[::-1])})


def transposed(weights: Invented) -> Invented:
    return replace(weights, changed={PROJ: weights.full(PROJ).t().contiguous()})


def ungrouped(weights: Invented) -> Invented:
    name = QKV.format(1)
    return replace(weights, changed={name: torch.cat(split(name, weights.full(name), MODEL))})


def through_bf16(weights: Invented) -> Invented:
    return replace(weights, changed={n: weights.full(n).bfloat16().float() for n in weights.names()})


def never_filled(weights: Invented) -> Invented:
    return replace(weights, changed={PROJ: torch.zeros_like(weights.full(PROJ))})


def noise(weights: Invented) -> Invented:
    return replace(weights, changed={PROJ: weights.full(PROJ) * 1.001})


def other_model(**fields: object) -> Callable[[Invented], Invented]:
    return lambda weights: replace(weights, model=weights.model.model_copy(update=fields))


# What is done to the right side -> first tensor that differs, words of the cause.
MISTAKES = {
    "unpermuted": (unpermuted, QKV.format(0), "permutation is missing"),
    "only q": (only_q_unpermuted, QKV.format(0), "permutation is missing"),
    "gate and up": (exchanged, FC1, "gate and up are exchanged"),
    "transposed": (transposed, PROJ, "transposed"),
    "ungrouped": (ungrouped, QKV.format(1), "one after the other"),
    "bf16": (through_bf16, "embedding.word_embeddings.weight", "went through bf16"),
    "zeros": (never_filled, PROJ, "never filled"),
    "noise": (noise, PROJ, "unknown"),
    "theta": (other_model(rope_theta=5e5), None, "theta"),
    "eps": (other_model(norm_eps=1e-5), None, "epsilon"),
    "scaling": (other_model(rope_scaling=RopeScaling()), None, "Llama 3.1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_cause_is_named(mistake: str, side: str) -> None:
    make, first, words = MISTAKES[mistake]
    sound = Invented(MODEL, torch.float32)
    wrong = make(sound)
    found = diagnose(sound, wrong) if side == "right" else diagnose(wrong, sound)
    assert not found.same
    assert words in found.cause
    assert (found.tensors[0].tensor if found.tensors else None) == first
    assert bool(found.fields) == (first is None)


def test_padding_of_the_vocabulary() -> None:
    sound = Invented(MODEL, torch.float32)
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    rows = {name: torch.cat((sound.full(name), torch.zeros(32, 64))) for name in vocabulary}
    wide = Invented(MODEL.model_copy(update={"vocab_size": 128}), torch.float32, changed=rows)
    found = diagnose(sound, wide)
    assert not found.tensors
    assert "pad" in found.cause
    assert "96 and 128" in found.fields["vocab_size"]


def test_one_side_rounded_is_the_same() -> None:
    sound = Invented(MODEL, torch.float32)
    rounded = replace(sound, dtype=torch.bfloat16)
    assert diagnose(sound, sound).same
    found = diagnose(sound, rounded)
    assert found.same
    assert found.rounded_to == "bfloat16"


def test_a_part_is_named_where_one_differs() -> None:
    sound = Invented(MODEL, torch.float32)
    q, k, v = split(QKV, sound.full(QKV.format(0)), MODEL)
    wrong = replace(sound, changed={QKV.format(0): join_qkv(q, k, v * 2, MODEL)})
    (found,) = diagnose(sound, wrong).tensors
    assert (found.part, found.largest, found.cause) == ("v", pytest.approx(0.5), "")


def said(left: Invented, right: Invented) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in "\n".join(_as_text(diagnose(left, right))).splitlines()]


def test_layers_that_are_alike_are_a_line() -> None:
    deep = ModelConfig(**(MODEL.model_dump() | {"num_layers": 12}))
    one, other = Invented(deep, torch.float32), Invented(deep, torch.float32, seed=1)
    found = [words for words in said(one, other) if "decoder.layers.{}.mlp.linear_fc1.weight" in words]
    assert [(words[0], words[2]) for words in found] == [("12", "gate"), ("12", "up")]


def test_what_has_one_cause_is_a_line() -> None:
    sound = Invented(MODEL, torch.float32)
    (found,) = (
        words for words in said(sound, through_bf16(sound)) if words[-1] == "bf16" and "likely" not in words
    )
    assert found[:2] == [str(len(sound.names())), "several"]


def test_what_is_not_finite_is_the_largest() -> None:
    sound = Invented(MODEL, torch.float32)
    for spoiled in LAYERS:
        names = [FC1.replace("0", str(layer)) for layer in LAYERS]
        changed = {name: sound.full(name) + 1 for name in names}
        changed[names[spoiled]] = sound.full(names[spoiled]) * nan
        found = [
            words
            for words in said(sound, replace(sound, changed=changed))
            if names[0].replace("0", "{}") in words
        ]
        assert [words[3] for words in found] == ["nan", "nan"]


def written(weights: Invented, folder: Path, form: object, dtype: torch.dtype) -> Path:
    folder.mkdir()
    form.FORMAT.write(weights, folder, WriteOptions(dtype, (WEIGHT,)), lambda size: None)  # type: ignore[attr-defined]
    return folder


def test_the_command_compares_across_formats(tmp_path: Path) -> None:
    sound = Invented(MODEL, torch.bfloat16)
    one = written(sound, tmp_path / "hf", huggingface, torch.bfloat16)
    same = written(sound, tmp_path / "native", native, torch.float32)
    wrong = written(unpermuted(sound), tmp_path / "wrong", native, torch.float32)
    result = CliRunner().invoke(app, ["compare-checkpoints", str(one), str(same)])
    assert result.exit_code == 0, result.output
    assert "15 tensors" in result.stdout
    assert "bfloat16" in result.stdout
    result = CliRunner().invoke(app, ["compare-checkpoints", str(one), str(wrong)])
    assert result.exit_code == 1
    assert f"first difference: {QKV.format(0)}" in result.stdout
    assert "permutation is missing" in result.stdout
    result = CliRunner().invoke(app, ["compare-checkpoints", str(one), str(wrong), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["same"], len(found["tensors"])) == (False, MODEL.num_layers)


def test_other_models_are_told_apart() -> None:
    small = ModelConfig(**(MODEL.model_dump() | {"num_layers": 1}))
    found = diagnose(Invented(MODEL, torch.float32), Invented(small, torch.float32))
    assert "another model" in found.fields["num_layers"]
