"""Export of a checkpoint that training wrote, at tp 2 with sequence parallelism and bf16 weights."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llama_mcore.checkpoint.manifest import read_manifest
from llama_mcore.checkpoint.paths import WEIGHT, step_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.cli import app
from llama_mcore.convert import verify as verify_module
from llama_mcore.convert.convert import convert as convert_checkpoint
from llama_mcore.convert.folder import RECEIPT
from llama_mcore.convert.formats import huggingface, native
from llama_mcore.convert.formats.huggingface import HfWeights
from llama_mcore.convert.formats.native import NativeWeights
from llama_mcore.convert.fused_weights import NameTable
from llama_mcore.convert.model_weights import Rounded
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.convert.verify import Place, Verification, digest
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, OutputError
from llama_mcore.generate.generate import generate
from llama_mcore.model.parameters import PARAMETERS
from llama_mcore.preprocess import preprocess
from llama_mcore.tokenizer.train import train_tokenizer
from tests.checkpoint.damage import edit_manifest, edit_tensors
from tests.support.errors import ANY, check_problem, refused
from tests.support.product import llama_mcore, metrics
from tests.support.world import ROOT

pytestmark = pytest.mark.process


def convert(input: Path, output: Path, **options: Any) -> None:
    convert_checkpoint(input, output, **({"target": "hf"} | options))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real steps on this package's own sources."""
    folder = tmp_path_factory.mktemp("run")
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.model"
    sources = sorted((ROOT / "llama_mcore").rglob("*.py"))
    corpus.write_bytes(b"".join(orjson.dumps({"text": path.read_text()}) + b"\n" for path in sources))
    train_tokenizer([corpus], tokenizer, vocab_size=500)
    preprocess([corpus], tokenizer, folder / "train", json_keys=["text"], workers=1, append_eod=True)
    settings = {
        "run.dir": folder / "train",
        "model.num_layers": 2,
        "model.hidden_size": 64,
        "model.num_attention_heads": 4,
        "model.num_query_groups": 2,
        "model.ffn_hidden_size": 176,
        "model.vocab_size": 512,  # padded beyond the tokenizer
        "model.seq_length": 64,
        "data.train": folder / "train_text_document",
        "data.valid": "null",
        "data.tokenizer": tokenizer,
        "train.steps": 2,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 2,
        "optim.warmup_steps": 1,
        "eval.interval": 0,
        "observe.tensorboard": "false",
    }
    train("tiny", *(f"{key}={value}" for key, value in settings.items()))
    return folder / "train"


def train(run: object, *words: object) -> None:
    done = llama_mcore("train", "--config", run, *words, ranks=2)
    assert done.exit_codes == [0, 0], done.output


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to spoil copies of, written in several files."""
    output = tmp_path_factory.mktemp("exported") / "hf"
    convert(run_dir, output, verify=False, max_shard_size="50KB")
    return output


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_export_is_verified_and_loads(run_dir: Path, tmp_path: Path, dtype: str) -> None:
    output = tmp_path / "hf"
    convert(run_dir, output, dtype=dtype)
    report = json.loads((tmp_path / "hf.report.json").read_text())
    assert (report["verified"], len(report["sha256"]), report["not_compared"]) == (True, 15, [])
    assert all(word in str(report["compared"]) for word in ("configuration", "tokenizer", "logits"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert (
        str(model.dtype)
        == {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}[dtype]
    )
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert model.config.bos_token_id == 1
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert (model.generation_config.do_sample, model.generation_config.max_length) == (True, 64)
    reader = CheckpointReader(find_checkpoint(run_dir))
    embedding = reader.full("embedding.word_embeddings.weight")[:500].to(model.dtype)
    assert reader.model.vocab_size == 512
    assert model.config.vocab_size == 500
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert json.loads((output / RECEIPT).read_text())["step"] == 2
    assert names_in(tmp_path) == ["hf"]


def test_a_run_starts_from_what_was_converted(run_dir: Path, tmp_path: Path) -> None:
    """Through Hugging Face and as it is: the same first loss to the last bit, not that of drawn weights."""
    convert(run_dir, tmp_path / "hf", dtype="fp32", verify=False)
    convert(tmp_path / "hf", tmp_path / "through-hf", target="native", tp=2, verify=False)
    convert(run_dir, tmp_path / "as-it-is", target="native", verify=False)
    first = []
    for start in ("through-hf", "as-it-is"):
        # nothing is drawn: how it would be does not matter
        drawn_so = f"model.init_std={0.02 if start == 'as-it-is' else 0.03}"
        overrides = [f"run.dir={tmp_path / start}-run", "model.vocab_size=500", "train.steps=1", drawn_so]
        train(run_dir / "config.yaml", "--init-from", tmp_path / start, *overrides)
        first.append([row["loss"] for row in metrics(tmp_path / f"{start}-run")])
    drawn = metrics(run_dir)[0]["loss"]
    assert first[0] == first[1]
    assert len(first[0]) == 1
    assert first[0][0] < drawn - 0.01


def test_a_run_goes_on_from_a_full_state_in_its_place(run_dir: Path, tmp_path: Path) -> None:
    """Moments and steps too: under the name of a checkpoint, in a folder that has no run."""
    convert(run_dir, tmp_path / "full", target="native", optimizer=True, verify=False)
    place = step_dir(tmp_path / "run", 2)
    place.parent.mkdir(parents=True)
    (tmp_path / "full").rename(place)
    train(run_dir / "config.yaml", f"run.dir={tmp_path / 'run'}", "model.vocab_size=500", "train.steps=3")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [3]
    before, after = (read_manifest(step_dir(tmp_path / "run", step)) for step in (2, 3))
    assert before.run_id == after.run_id
    assert after.consumed_samples == 6


def test_files_have_the_permissions_of_any_new_file(exported: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()}
    (exported.parent / "new").touch()
    assert modes == {stat.S_IMODE((exported.parent / "new").stat().st_mode)}


def test_sharded_export_loads(exported: Path, run_dir: Path) -> None:
    files = sorted(exported.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for path in files for t in load_file(path).values()
    )
    result = verify(run_dir, exported)
    assert not result.problems
    assert not result.skipped


def test_tokenizer_encodes_as_sentencepiece_does(exported: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(exported)
    ours = Tokenizer(exported / "tokenizer.model")
    sources = [path.read_text() for path in sorted((ROOT / "llama_mcore").rglob("*.py"))]
    fragments = [text[start : start + 97] for text in sources for start in range(0, len(text), 89)]
    fragments += [" " * count + "x" + " " * (40 - count) for count in range(41)]
    strange = [" a", "  a", "\n", "1234 5", "<s></s><unk><0x0A>", "\u2581", "\u6f22 \U0001f642", "\u0000"]
    for text in sources + fragments + strange:
        assert theirs.encode(text, split_special_tokens=True) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eod)
    assert theirs.model_max_length == 64


def test_export_is_replaced_by_the_next(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    convert(run_dir, output, verify=False, max_shard_size="50KB")
    convert(run_dir, output, verify=False, force=True)
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]
    assert names_in(tmp_path) == ["hf"]


def test_run_and_export_generate_the_same(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    convert(run_dir, output, dtype="fp32", verify=False)
    ours, theirs = (
        [generate(path, "def main", max_new_tokens=12, seed=seed) for seed in range(4)]
        for path in (run_dir, output)
    )
    assert ours == theirs
    assert all(text.startswith("def main") for text in ours)
    assert len(set(ours)) > 1


def spoil_tensor(folder: Path, name: str, change) -> None:
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def config(**changes: object) -> Callable[[Path], None]:
    """Spoils the configuration so."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))

    return spoil


def flip_lowest_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16).view(-1)[5] ^= 1
    return tensor


QUERY, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FUSED = "decoder.layers.1.self_attention.linear_qkv.weight"
# What is spoiled -> the problem that says so.
FAULTS: dict[str, tuple[Callable[[Path], None], str, object]] = {
    "one bit": (lambda folder: spoil_tensor(folder, QUERY, flip_lowest_bit), "tensor", FUSED),
    "shape": (lambda folder: spoil_tensor(folder, GATE, lambda t: t[:-1].clone()), "tensor", GATE),
    "theta": (config(rope_parameters={"rope_theta": 2e4}), "configuration: rope_theta", 2e4),
    "eps": (config(rms_norm_eps=1e-5), "configuration: norm_eps", 1e-5),
    "tied": (config(tie_word_embeddings=True), "configuration: tie_embeddings", True),
    "scaling": (config(rope_parameters=STRETCHED), "configuration: rope_scaling", ANY),
    "scaling cut": (config(rope_parameters={"rope_type": "llama3"}), "config.json: factor", "(not given)"),
    "scaling kind": (config(rope_parameters={"rope_type": "yarn"}), "config.json: rope_type", "yarn"),
    "other model": (config(model_type="gpt2"), "config.json: model_type", "gpt2"),
    "file gone": (lambda folder: next(folder.glob("*-00002-*")).unlink(), "file", ANY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verification_finds(fault: str, run_dir: Path, exported: Path, tmp_path: Path) -> None:
    spoil, field, value = FAULTS[fault]
    spoiled = Path(shutil.copytree(exported, tmp_path / "spoiled"))
    spoil(spoiled)
    check_problem(verify(run_dir, spoiled).problems, field, value, remedy=False)


def test_verification_finds_what_only_running_the_model_shows(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writer and reader that agree on a wrong table, gate and up exchanged: every tensor reads back equal."""
    wrong = {each.name: each.hugging_face[:: -1 if each.fused == "gate_up" else 1] for each in PARAMETERS}
    monkeypatch.setattr(huggingface, "HUGGING_FACE", NameTable(wrong))
    output = tmp_path / "hf"
    with refused(CheckpointError, "relative error of the logits", remedy=False):
        convert(run_dir, output)
    assert names_in(tmp_path) == ["hf.report.json", "hf.unverified"]
    assert json.loads((tmp_path / "hf.report.json").read_text())["verified"] is False
    monkeypatch.undo()
    convert(run_dir, output)
    assert HfWeights(output).model == NativeWeights(run_dir).model


def test_verification_says_what_it_left_out(
    run_dir: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "find_spec", lambda name: None)
    result = verify(run_dir, exported)
    assert not result.problems
    assert "llama-mcore[hf]" in str(result)
    assert not any("transformers" in each for each in result.compared)
    assert any("logits by our model" in each for each in result.compared)


def test_bits_are_compared_not_values() -> None:
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert digest(zero) == digest(zero.clone()) != digest(-zero)
    assert digest(nan) == digest(nan.clone())
    assert len({digest(zero), digest(zero.bfloat16()), digest(zero[None]), digest(zero[:2])}) == 4


@pytest.mark.parametrize("target", ["hf", "native"])
def test_no_dtype_is_advised_for_what_the_source_holds(run_dir: Path, tmp_path: Path, target: str) -> None:
    copied = Path(shutil.copytree(find_checkpoint(run_dir), tmp_path / "step-00000002"))
    name = "weight/decoder.final_layernorm.weight/0"
    edit_tensors(copied, lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")))
    with refused(CheckpointError, "decoder.final_layernorm.weight", "inf or nan") as caught:
        convert(copied, tmp_path / "out", target=target)
    assert "older checkpoint" in caught.value.problems[0].remedy
    assert "--dtype" not in caught.value.problems[0].remedy


def test_weights_beyond_fp16_are_refused(run_dir: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(find_checkpoint(run_dir), tmp_path / "step-00000002"))
    name = "weight/decoder.final_layernorm.weight/0"
    edit_tensors(copied, lambda tensors: tensors[name].view(-1)[:1].fill_(1e5))
    with refused(CheckpointError, "decoder.final_layernorm.weight", "inf or nan") as caught:
        convert(copied, tmp_path / "hf", dtype="fp16")
    assert "--dtype bf16" in caught.value.problems[0].remedy
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    convert(copied, tmp_path / "hf", dtype="bf16")


def test_all_unknown_choices_are_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(run_dir, tmp_path / "hf", target="gguf", dtype="int8")
    assert [problem.value for problem in caught.value.problems] == ["gguf", "int8"]


def test_missing_checkpoint(tmp_path: Path) -> None:
    with refused(MissingInputError, "--input", tmp_path / "nothing", remedy=False):
        convert(tmp_path / "nothing", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "gone", "one bit"])
def test_damaged_rank_file(run_dir: Path, tmp_path: Path, damage: str) -> None:
    copied = Path(shutil.copytree(find_checkpoint(run_dir), tmp_path / "step-00000002"))
    path = copied / "rank-00001.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    if damage == "one bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    result = CliRunner().invoke(
        app, ["convert", "--input", str(copied), "--to", "hf", "--output", str(tmp_path / "hf")]
    )
    assert result.exit_code == CheckpointError.exit_code
    (line,) = (line for line in result.output.splitlines() if "rank-00001.safetensors" in line)
    assert {"cut": "bytes", "gone": "read", "one bit": "SHA-256"}[damage] in line
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_tokenizer_of_the_run_is_gone(run_dir: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(find_checkpoint(run_dir), tmp_path / "step-00000002"))
    elsewhere = {"tokenizer": "elsewhere/tokenizer.model"}
    edit_manifest(copied, lambda manifest: manifest["config"]["data"].update(elsewhere))
    with refused(MissingInputError, "data.tokenizer", "elsewhere/tokenizer.model"):
        convert(copied, tmp_path / "hf")


@pytest.mark.parametrize("taken", ["hf", "hf.tmp", "hf.unverified"])
def test_what_convert_did_not_write_stays(run_dir: Path, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "thesis.txt").write_text("irreplaceable")
    with refused(OutputError, "--output", tmp_path / taken):
        convert(run_dir, tmp_path / "hf")
    assert (tmp_path / taken / "thesis.txt").read_text() == "irreplaceable"


def test_output_that_is_a_file_or_lies_in_one(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "hf"):
        with pytest.raises(OutputError):
            convert(run_dir, output)


def verify(run_dir: Path, folder: Path) -> Verification:
    weights = Rounded(NativeWeights(run_dir), torch.bfloat16)
    source, target = Place(native.FORMAT, run_dir), Place(huggingface.FORMAT, folder)
    return verify_module.verify(weights, source, target, WriteOptions(torch.bfloat16, (WEIGHT,)))


def names_in(folder: Path) -> list[str]:
    """Names in a folder, without the report of a successful verification."""
    reports = [path for path in folder.glob("*.report.json") if json.loads(path.read_text())["verified"]]
    return sorted(path.name for path in folder.iterdir() if path not in reports)
