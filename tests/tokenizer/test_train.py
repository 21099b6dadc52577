"""llama_mcore.tokenizer.train and what it is made of: corpus, memory, report."""

import gzip
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from typer.testing import CliRunner

from llama_mcore.cli import app
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import (
    ConfigError,
    DataError,
    LlamaMcoreError,
    MissingInputError,
    OutputError,
    PreflightError,
)
from llama_mcore.progress import ByteProgress
from llama_mcore.tokenizer import train
from llama_mcore.tokenizer.corpus import find_sources, read_texts
from llama_mcore.tokenizer.memory import TrainerMemory
from llama_mcore.tokenizer.report import report_on
from llama_mcore.tokenizer.train import train_tokenizer
from llama_mcore.units import parse_bytes
from tests.support.errors import refused
from tests.support.text import write_jsonl
from tests.support.world import TIMEOUT_S

# What protobuf reads in the tokenizer.model released with LLaMA (md5 eeec4125e9c7560836b4873b6f8e3025): every
# field of it, but those that say where it was made: input, model_prefix, num_threads and vocab_size.
LLAMA_TRAINER_SPEC = {
    "model_type": model_pb2.TrainerSpec.BPE,
    "accept_language": [],
    "self_test_sample_size": 0,
    "character_coverage": pytest.approx(0.99995, rel=1e-6),
    "input_sentence_size": 200_000_000,
    "seed_sentencepiece_size": 1_000_000,
    "shrinking_factor": 0.75,
    "num_sub_iterations": 2,
    "max_sentence_length": 4192,
    "shuffle_input_sentence": True,
    "max_sentencepiece_length": 16,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "treat_whitespace_as_suffix": False,
    "split_digits": True,
    "pretokenization_delimiter": "",
    "allow_whitespace_only_pieces": True,
    "control_symbols": [],
    "user_defined_symbols": [],
    "vocabulary_output_piece_score": True,
    "hard_vocab_limit": True,
    "use_all_vocab": False,
    "byte_fallback": True,
    "required_chars": "",
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \u2047 ",
    "unk_piece": "<unk>",
    "bos_piece": "<s>",
    "eos_piece": "</s>",
    "pad_piece": "<pad>",
    "train_extremely_large_corpus": False,
    "auto_character_coverage": False,
    "mining_sentence_size": 0,
    "training_sentence_size": 0,
    "seed_sentencepieces_file": "",
    "enable_differential_privacy": False,
    "differential_privacy_noise_level": 0,
    "differential_privacy_clipping_threshold": 0,
}
# The released file names this one; a model that is made through an iterator says nothing, and text is meant.
NAMED_OTHERWISE = {"input_format": ("", "text")}
HOW_IT_WAS_MADE = {"input", "model_prefix", "num_threads", "vocab_size"}
LLAMA_NORMALIZER_SPEC = {
    "name": "identity",
    "precompiled_charsmap": b"",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "escape_whitespaces": True,
    "normalization_rule_tsv": "",
}
ANOTHER_PROCESS = """
import os, sys
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]))
from pathlib import Path
from llama_mcore.tokenizer.train import train_tokenizer
train_tokenizer([sys.argv[2]], Path(sys.argv[3]), vocab_size=400, bytes_per_source=5000, seed=3)
"""


def parse(path: Path) -> model_pb2.ModelProto:
    return model_pb2.ModelProto.FromString(path.read_bytes())


def values(spec: Any) -> dict[str, Any]:
    names = [field.name for field in spec.DESCRIPTOR.fields]
    values = {name: getattr(spec, name) for name in names}
    return {n: v if isinstance(v, bool | int | float | str | bytes) else list(v) for n, v in values.items()}


def record_of(model: Path) -> dict[str, Any]:
    record: dict[str, Any] = orjson.loads(model.with_name(model.name + ".json").read_bytes())
    return record


def documents(texts: Iterable[str]) -> list[dict[str, object]]:
    return [{"text": text} for text in texts]


def words(first: int, count: int) -> list[str]:
    """Lines of words that no other range of numbers shares."""
    return [
        " ".join(f"w{chr(97 + (n * k) % 26)}{n:x}" for k in range(1, 9)) for n in range(first, first + count)
    ]


# --- settings and layout of the released tokenizer


def test_every_setting_is_llamas(tokenizer_model: Path) -> None:
    model = parse(tokenizer_model)
    trainer = values(model.trainer_spec)
    for name, choices in NAMED_OTHERWISE.items():
        assert trainer.pop(name) in choices
    for name in HOW_IT_WAS_MADE:
        trainer.pop(name)
    assert trainer == LLAMA_TRAINER_SPEC
    assert values(model.normalizer_spec) == LLAMA_NORMALIZER_SPEC
    assert not model.HasField("denormalizer_spec")


def test_layout_is_llamas(tokenizer_model: Path) -> None:
    """Control tokens, bytes, merges in the order in which they were learnt, then single characters."""
    pieces = parse(tokenizer_model).pieces
    kinds = model_pb2.ModelProto.SentencePiece
    assert [(piece.piece, piece.type) for piece in pieces[:3]] == [
        ("<unk>", kinds.UNKNOWN),
        ("<s>", kinds.CONTROL),
        ("</s>", kinds.CONTROL),
    ]
    assert [piece.piece for piece in pieces[3:259]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {piece.type for piece in pieces[3:259]} == {kinds.BYTE}
    assert {piece.type for piece in pieces[259:]} == {kinds.NORMAL}
    num_merges = sum(len(piece.piece) > 1 for piece in pieces[259:])
    assert all(len(piece.piece) > 1 for piece in pieces[259 : 259 + num_merges])
    characters = pieces[259 + num_merges :]
    assert characters[0].piece == "\u2581"
    assert all(len(piece.piece) == 1 for piece in characters)
    scores = [piece.score for piece in pieces[259:]]
    assert all(
        score == -number
        for number, score in enumerate(scores)
        if set(pieces[259 + number].piece) != {"\u2581"}
    )


def test_spaces_merge_last_as_in_the_released_model(tmp_path: Path) -> None:
    """LLaMA's tokens of an indented line: the spaces before the last, then the word with its own."""
    source = write_jsonl(tmp_path / "code.jsonl", documents(["def f():\n        return\n    return"] * 50))
    train_tokenizer([source], tmp_path / "t.model", vocab_size=285)
    spaces = [piece for piece in parse(tmp_path / "t.model").pieces if set(piece.piece) == {"\u2581"}]
    assert {len(piece.piece) for piece in spaces} >= {1, 2, 4}
    assert {piece.score for piece in spaces} == {-1e9}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert processor.encode("    return", out_type=str)[-1] == "\u2581return"


def test_digits_are_split_one_by_one(tokenizer_model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    pieces = [processor.id_to_piece(token) for token in range(259, processor.vocab_size())]
    assert not [piece for piece in pieces if len(piece) > 1 and any(c.isdigit() for c in piece)]
    assert processor.encode("1984", out_type=str)[-4:] == ["1", "9", "8", "4"]


# --- the same bytes


def test_same_corpus_gives_same_bytes(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "again.model", vocab_size=400)
    assert Tokenizer(tmp_path / "again.model").sha256 == Tokenizer(tokenizer_model).sha256


@pytest.mark.process
def test_same_bytes_in_another_process_on_any_number_of_cores(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(words(0, 300)))
    for name, cores in (("one", "1"), ("all", "1000")):
        command = [sys.executable, "-c", ANOTHER_PROCESS, cores, str(source), str(tmp_path / name)]
        environment = {**os.environ, "PYTHONHASHSEED": str(len(name) + int(cores))}
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S, env=environment)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "all").read_bytes()
    assert record_of(tmp_path / "one")["sources"] == record_of(tmp_path / "all")["sources"]


def test_seeds_differ_under_a_budget(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(words(0, 300)))
    for seed in (1, 2):
        train_tokenizer(
            [source], tmp_path / f"{seed}.model", vocab_size=350, bytes_per_source=5000, seed=seed
        )
    assert (tmp_path / "1.model").read_bytes() != (tmp_path / "2.model").read_bytes()


# --- sources


def test_each_format_and_form_of_input_is_a_source(tmp_path: Path) -> None:
    lines = words(0, 40)
    (tmp_path / "books").mkdir()
    (tmp_path / "wiki").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "books" / name).write_text("\r\n".join(lines) + "\n\n")
    write_jsonl(tmp_path / "wiki" / "en-1.jsonl", documents(lines))
    (tmp_path / "wiki" / "en-2.jsonl.gz").write_bytes(
        gzip.compress((tmp_path / "wiki" / "en-1.jsonl").read_bytes())
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "c4.parquet")
    train_tokenizer(
        [tmp_path / "books", f"{tmp_path}/wiki/en-*", f"crawl={tmp_path}/c4.parquet"],
        tmp_path / "t.model",
        vocab_size=320,
    )
    sources = {source["name"]: source for source in record_of(tmp_path / "t.model")["sources"]}
    assert set(sources) == {"books", "en", "crawl"}
    size = sum(len(line.encode()) for line in lines)
    assert {name: source["text_bytes"] for name, source in sources.items()} == {
        "books": 2 * size,
        "en": 2 * size,
        "crawl": size,
    }
    assert {name: source["documents"] for name, source in sources.items()} == {
        "books": 2,
        "en": 80,
        "crawl": 40,
    }


def test_inputs_of_one_name_are_one_source(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", documents(["x"]))
    (source,) = find_sources([f"wiki={tmp_path}/a.jsonl", f"wiki={tmp_path}/b.jsonl"])
    assert (source.name, [file.path.name for file in source.files]) == ("wiki", ["a.jsonl", "b.jsonl"])


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "seed=1.jsonl", documents(["x"]))
    assert [source.name for source in find_sources(["seed=1.jsonl"])] == ["seed=1"]


def test_two_unnamed_sources_cannot_share_a_name(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "wiki.jsonl", documents(["x"]))
    with refused(ConfigError, "--input", tmp_path / "b/wiki.jsonl"):
        find_sources([tmp_path / "a/wiki.jsonl", tmp_path / "b/wiki.jsonl"])


def test_missing_inputs_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError) as error:
        find_sources([f"wiki={tmp_path}/no.jsonl", f"{tmp_path}/none-*.txt"])
    assert len(error.value.problems) == 2


# --- the byte budget


def test_a_budget_for_each_source(tmp_path: Path) -> None:
    large = write_jsonl(tmp_path / "large.jsonl", documents(words(0, 900)))
    small = write_jsonl(tmp_path / "small.jsonl", documents(words(5000, 20)))
    train_tokenizer([large, small], tmp_path / "t.model", vocab_size=330, bytes_per_source=9000)
    sources = {source["name"]: source for source in record_of(tmp_path / "t.model")["sources"]}
    assert 9000 - 60 < sources["large"]["text_bytes_used"] <= 9000 < sources["large"]["text_bytes"]
    assert sources["large"]["lines_used"] < sources["large"]["lines"] == 900
    assert sources["small"]["text_bytes_used"] == sources["small"]["text_bytes"]


def test_the_model_learns_from_the_sample_alone(tmp_path: Path) -> None:
    """A model trained on the sampled lines themselves has the same bytes."""
    source = write_jsonl(tmp_path / "a.jsonl", documents(words(0, 600)))
    train_tokenizer([source], tmp_path / "budget.model", vocab_size=330, bytes_per_source=6000)
    from llama_mcore.tokenizer.corpus import Reservoir

    reservoir = Reservoir(6000, "0 a")
    for line in words(0, 600):
        reservoir.add(line.encode())
    sampled = write_jsonl(tmp_path / "b.jsonl", documents(line.decode() for line in reservoir.sample()))
    train_tokenizer([sampled], tmp_path / "all.model", vocab_size=330)
    assert (tmp_path / "budget.model").read_bytes() == (tmp_path / "all.model").read_bytes()


def test_lines_that_sentencepiece_would_drop_are_counted(tmp_path: Path, corpus: Path) -> None:
    odd = write_jsonl(tmp_path / "odd.jsonl", documents(["x" * 4192, "x" * 4193, "a \u2585 b", "", "\r\n"]))
    train_tokenizer([corpus, odd], tmp_path / "t.model", vocab_size=400)
    source = record_of(tmp_path / "t.model")["sources"][1]
    assert (source["documents"], source["lines"], source["text_bytes"]) == (5, 1, 4192)
    assert source["lines_left_out"] == 2


# --- memory


def test_memory_of_text_that_cannot_fit_is_refused_before_reading(tmp_path: Path) -> None:
    source = tmp_path / "large.jsonl"
    source.write_bytes(b"not JSON\n")
    os.truncate(source, 10**9)
    with refused(PreflightError, "--max-memory", "2.00 GB") as error:
        train_tokenizer([source], tmp_path / "t.model", vocab_size=32000, max_memory=2 * 10**9)
    assert "1.00 GB" in str(error.value)
    assert "4.06 GB" in str(error.value)
    remedy = re.search(r"--bytes-per-source (\w+)", str(error.value))
    assert remedy
    memory = TrainerMemory(2 * 10**9, 1)
    memory.check_ahead(parse_bytes("", remedy[1]))
    with pytest.raises(PreflightError):
        memory.check_ahead(int(1.1 * parse_bytes("", remedy[1])))


def test_memory_of_text_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    """Distinct words make the difference, and only reading shows them."""
    many = write_jsonl(tmp_path / "many.jsonl", documents(words(0, 40_000)))
    few = write_jsonl(tmp_path / "few.jsonl", documents(words(0, 100) * 400))
    for budget in (None, 10**7):
        with refused(PreflightError, "--max-memory", "80.0 MB") as error:
            train_tokenizer(
                [many], tmp_path / "t.model", vocab_size=300, bytes_per_source=budget, max_memory=80 * 10**6
            )
        assert re.search(r"--bytes-per-source [0-9.]+[KM]B", error.value.problems[0].remedy)
    assert not list(tmp_path.glob("*t.model*"))
    train_tokenizer([few], tmp_path / "t.model", vocab_size=320, max_memory=80 * 10**6)


@pytest.mark.process
def test_memory_estimate_covers_training(tmp_path: Path) -> None:
    """Measured in a process of its own, on costly text: ideographs without a space, few of them common."""
    draw = random.Random(0)
    lines = ["".join(chr(0x4E00 + int(2000 * draw.random() ** 4)) for _ in range(60)) for _ in range(15_000)]
    source = write_jsonl(tmp_path / "a.jsonl", documents(lines))
    memory = TrainerMemory(None, 1)
    memory.add([line.encode() for line in lines])
    code = (
        "import re, sys; from pathlib import Path\n"
        "from llama_mcore.tokenizer.train import train_tokenizer\n"
        "def peak(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "train_tokenizer([sys.argv[1]], Path(sys.argv[2]), vocab_size=3000)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "t.model")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    measured = int(done.stdout.splitlines()[-1])
    assert 0.8 * measured < memory.peak < 3 * measured


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "option", "bound"),
    [
        ({"vocab_size": 259}, "--vocab-size", "260"),
        ({"vocab_size": 2**31}, "--vocab-size", f"{2**31 - 1}"),
        ({"bytes_per_source": 4191}, "--bytes-per-source", "4192"),
        ({"seed": -1}, "--seed", "0"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, int], option: str, bound: str, corpus: Path, tmp_path: Path
) -> None:
    (value,) = settings.values()
    with refused(ConfigError, option, value, remedy=option != "--seed") as error:
        train_tokenizer([corpus], tmp_path / "t.model", **{"vocab_size": 400, **settings})
    assert bound in error.value.problems[0].reason


def test_vocabulary_larger_than_the_text_supports(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "small.jsonl", documents(["hello world"]))
    with refused(DataError, "--vocab-size", 4096) as error:
        train_tokenizer([source], tmp_path / "t.model", vocab_size=4096)
    most = named_vocabulary(error.value)
    train_tokenizer([source], tmp_path / "t.model", vocab_size=most)
    assert Tokenizer(tmp_path / "t.model").vocab_size == most


def named_vocabulary(error: LlamaMcoreError) -> int:
    """The size that a remedy gives."""
    match = re.search(r"--vocab-size (\d+)", error.problems[0].remedy)
    assert match
    return int(match[1])


def test_vocabulary_smaller_than_the_characters(corpus: Path, tmp_path: Path) -> None:
    with refused(DataError, "--vocab-size", 270) as error:
        train_tokenizer([corpus], tmp_path / "t.model", vocab_size=270)
    train_tokenizer([corpus], tmp_path / "t.model", vocab_size=named_vocabulary(error.value))


@pytest.mark.parametrize(
    ("texts", "said"),
    [([], "empty"), (["", ""], "no text in 2 documents"), (["x" * 5000], "1 lines, all of them")],
)
def test_text_without_a_usable_line(texts: list[str], said: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", documents(texts))
    for budget in (None, 5000):
        with refused(DataError, "--input", "all documents" if any(texts) else source) as error:
            train_tokenizer([source], tmp_path / "t.model", vocab_size=300, bytes_per_source=budget)
        assert said in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


def test_a_bad_line_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text('{"text": "fine"}\nnot JSON\n')
    for budget in (None, 5000):
        with refused(DataError, "--input", f"{source} line 2", remedy=False):
            train_tokenizer([source], tmp_path / "t.model", vocab_size=300, bytes_per_source=budget)
    assert list(tmp_path.iterdir()) == [source]


def test_output_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "t.model.json").mkdir()
    for output, named in [
        (tmp_path / "file" / "t.model", tmp_path / "file" / "t.model"),
        (tmp_path / "file" / "deeper" / "t.model", tmp_path / "file" / "deeper" / "t.model"),
        (tmp_path, tmp_path),
        (tmp_path / "t.model", tmp_path / "t.model.json"),
    ]:
        with pytest.raises(OutputError) as error:
            train_tokenizer([corpus], output, vocab_size=300)
        assert error.value.problems[0].value == named


# --- what is said and stored


def test_progress_of_training_is_in_our_own_lines(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SECONDS_BETWEEN_LINES", 1e6)
    train_tokenizer([corpus], tmp_path / "quiet.model", vocab_size=400)
    out, err = capfd.readouterr()
    assert Tokenizer(tmp_path / "quiet.model").sha256 in out
    assert len(out.splitlines()) == len(err.splitlines()) == 1


def test_progress_while_merges_are_learnt(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SECONDS_BETWEEN_LINES", 0.001)
    train_tokenizer([corpus], tmp_path / "t.model", vocab_size=400)
    lines = capfd.readouterr().err.splitlines()
    assert re.search(r"\d\.\d\d GB", lines[0])
    assert re.search(r"\d+ s .* \d\.\d\d GB", lines[-1])


def test_the_record_tells_what_made_the_model(corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "t.model"
    train_tokenizer([f"mixed={corpus}"], model, vocab_size=400, seed=7, bytes_per_source=6000)
    record = record_of(model)
    assert record["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (record["vocab_size"], record["seed"], record["bytes_per_source"]) == (400, 7, 6000)
    assert record["settings"]["character_coverage"] == 0.99995
    assert record["versions"]["sentencepiece"] == sentencepiece.__version__
    (source,) = record["sources"]
    assert source["name"] == "mixed"
    assert source["documents"] == 120
    assert source["files"] == [{"path": str(corpus), "bytes": corpus.stat().st_size}]
    assert record["report"] is None


@pytest.mark.process
@pytest.mark.parametrize("moment", ["reading", "learning"])
def test_an_interrupt_ends_it_at_once_and_leaves_nothing(tmp_path: Path, moment: str) -> None:
    """While it learns the signal itself ends the process: Python would hear of it after the last merge."""
    source = tmp_path / "source.jsonl"
    if moment == "reading":
        os.mkfifo(source)
    else:
        write_jsonl(source, documents(words(0, 100_000)))
    command = [sys.executable, "-m", "llama_mcore.cli", "train-tokenizer"]
    command += ["--input", str(source), "--output", str(tmp_path / "t.model"), "--vocab-size", "8000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr
        if moment == "reading":
            with source.open("w") as stream:
                stream.write('{"text": "a"}\n')
                stream.flush()
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 130
        else:
            assert "learning the merges" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == -signal.SIGINT
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


@pytest.mark.parametrize("compress", [lambda text: text, gzip.compress, zstandard.compress])
def test_progress_counts_the_bytes_on_disk(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    lines = [orjson.dumps({"text": line}) + b"\n" for line in words(0, 20_000)]
    suffix = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(compress, "")
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"".join(lines)))
    (source,) = find_sources([path])
    progress = ByteProgress("test", path.stat().st_size)
    shares = []
    for _ in read_texts(source.files[0], "text", progress):
        shares.append(progress.bytes / progress.total_bytes)
    assert 0.3 < shares[10_000] < 0.7
    assert shares == sorted(shares)
    assert (progress.bytes, progress.documents) == (progress.total_bytes, 20_000)


def test_progress_never_passes_the_end(tmp_path: Path) -> None:
    """The start of this file says little of the rest, which is compressed far better."""
    texts = [random.Random(n).randbytes(1000).hex() for n in range(500)] + ["the same"] * 100_000
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)))
    (source,) = find_sources([path])
    progress = ByteProgress("test", path.stat().st_size)
    assert all(progress.bytes <= progress.total_bytes for _ in read_texts(source.files[0], "text", progress))
    assert progress.bytes == progress.total_bytes


# --- the report


def test_report_of_each_source(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rare = write_jsonl(tmp_path / "rare.jsonl", documents(["\u0e20 a"]))
    model = tmp_path / "t.model"
    train_tokenizer([corpus, rare], model, vocab_size=400, report=True)
    report = record_of(model)["report"]
    english, other = report["sources"]
    texts = [record["text"] for record in map(orjson.loads, corpus.read_bytes().splitlines())]
    lines = [line.rstrip("\r") for text in texts for line in text.split("\n") if line.rstrip("\r")]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert english["tokens"] == sum(map(len, processor.encode(lines)))
    assert english["bytes_per_token"] == sum(len(line.encode()) for line in lines) / english["tokens"]
    assert other["byte_tokens"] == 3
    assert english["lines_changed"] == other["lines_changed"] == 0
    assert report["digits_are_single"]
    assert report["unknown_come_back"]
    assert "\u0e20" in report["unknown_characters"]
    longest = max(len(processor.id_to_piece(token)) for token in range(259, 400))
    assert len(report["longest_pieces"][0]) == longest
    out = capsys.readouterr().out
    assert f"{english['bytes_per_token']:.3f}" in out
    assert "digits are single tokens: yes" in out


def test_report_sees_a_model_without_split_digits_or_bytes() -> None:
    model = BytesIO()
    lines = [f"in {year} and in {year}" for year in (1984, 1985, 1999, 2000)] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=30,
        model_type="bpe",
        split_digits=False,
        minloglevel=2,
    )
    report = report_on(model.getvalue(), {"years": [b"in 1984", "caf\u00e9".encode()]})
    assert not report.digits_are_single
    assert not report.unknown_come_back
    assert report.sources[0].lines_changed == 1
    assert "digits are single tokens: NO" in report.table()


# --- the command


def test_the_command_takes_sizes_and_ends_with_the_code_of_its_error(corpus: Path, tmp_path: Path) -> None:
    arguments = ["train-tokenizer", "--input", f"web={corpus}", "--output", str(tmp_path / "t.model")]
    run = CliRunner().invoke
    done = run(app, [*arguments, "--vocab-size", "400", "--bytes-per-source", "6KB", "--report"])
    assert done.exit_code == 0, done.output
    record = record_of(tmp_path / "t.model")
    assert (record["bytes_per_source"], record["sources"][0]["name"]) == (6000, "web")
    assert record["sha256"] in done.output
    assert run(app, [*arguments, "--max-memory", "1MB", "--force"]).exit_code == 69
    assert run(app, [*arguments, "--bytes-per-source", "much"]).exit_code == 64
