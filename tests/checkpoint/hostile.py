"""Files that somebody made to break what reads them, and the commands of the product that read them.

Each command runs in a process of its own, which may take `MEMORY` beyond what it has when it begins, and
`SECONDS` of a processor.
"""

import gzip
import hashlib
import io
import json
import os
import resource
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from llama_mcore.convert.registry import NAMES, get_format
from tests.checkpoint.damage import FIRST_RANK, edit_manifest
from tests.checkpoint.tiny import write_checkpoint
from tests.support.models import write_tokens
from tests.support.product import run_command
from tests.support.world import exit_codes_of, write_output_to

MEMORY = 512 << 20
SECONDS = 20
CANARY = "canary"
DEEP = 100_000

Words = list[str]
Content = bytes | Callable[[Path], bytes]
"""Content of a file, or a function that makes it in the folder of the case, where it is large."""


def made(content: Content, folder: Path) -> bytes:
    return content if isinstance(content, bytes) else content(folder)


@cache
def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../escaped", bytes(64 << 20))
    return file.getvalue()


def zip_bomb(_: Path) -> bytes:
    return zipped()


def gzip_bomb(_: Path) -> bytes:
    return gzip.compress(bytes(64 << 20))


def payload(folder: Path) -> bytes:
    """A pickle that makes a file where it is loaded."""
    return f"cposix\nsystem\n(S'touch {folder / CANARY}'\ntR.".encode()


def inspected(folder: Path) -> Words:
    return ["inspect-checkpoint", str(next(folder.glob("checkpoints/step-*"))), "--verify"]


# Rank files. The manifest has their size and hash: whoever made them knew how to seal it.


def rank_file(content: Content) -> Callable[[Path], Words]:
    def prepare(folder: Path) -> Words:
        checkpoint = write_checkpoint(folder)
        written = made(content, folder)
        (checkpoint / FIRST_RANK).write_bytes(written)
        sealed = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        edit_manifest(checkpoint, lambda manifest: manifest["files"][0].update(sealed))
        return inspected(folder)

    return prepare


def tensors(header: str | dict, body: int = 16, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body)


def entry(**changes: object) -> dict[str, object]:
    """Header entry of a tensor of four elements."""
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes


METADATA = {"run_id": "5f0e", "step": "4", "rank": "0"}
KEY = "weight/embedding.word_embeddings.weight/0"
PLACES = (entry(shape=[2], data_offsets=[0, 8]), entry(shape=[2], data_offsets=[8, 16]))
TWICE = "{" + ", ".join(f'"{KEY}": {json.dumps(place)}' for place in PLACES) + "}"


def named(*names: str, **changes: object) -> bytes:
    """One tensor under each name, all of them the same bytes."""
    return tensors({"__metadata__": METADATA, **{name: entry(**changes) for name in names}})


def many_names(_: Path) -> bytes:
    places = {f"{KEY}{n}": entry(shape=[0], data_offsets=[0, 0]) for n in range(100_000)}
    return tensors({"__metadata__": METADATA, **places}, body=0)


RANK_FILES = {
    "empty-file": rank_file(b""),
    "pickle-as-tensors": rank_file(payload),
    "zip-bomb-as-tensors": rank_file(zip_bomb),
    "gzip-bomb-as-tensors": rank_file(gzip_bomb),
    "header-2^63": rank_file(tensors({}, length=1 << 63)),
    "header-2^64": rank_file(tensors({}, length=(1 << 64) - 1)),
    "header-beyond-the-file": rank_file(tensors({KEY: entry()}, length=1000)),
    "header-of-nothing": rank_file(tensors("", length=0)),
    "header-is-no-json": rank_file(tensors("{" * 40)),
    "header-is-a-list": rank_file(tensors("[1, 2]")),
    "header-nested": rank_file(tensors('{"a":' * DEEP)),
    "header-nested-lists": rank_file(tensors('{"a":' + "[" * DEEP)),
    "header-padded": rank_file(tensors(" " * (8 << 20))),
    "overlap": rank_file(tensors({"a": entry(), "b": entry(data_offsets=[8, 24])}, body=24)),
    "hole": rank_file(tensors({"a": entry(), "b": entry(data_offsets=[32, 48])}, body=48)),
    "hole-at-the-end": rank_file(tensors({"a": entry()}, body=1000)),
    "same-bytes-twice": rank_file(named(KEY, "b")),
    "beyond-the-end": rank_file(named(KEY, data_offsets=[0, 1 << 40])),
    "backwards": rank_file(named(KEY, data_offsets=[16, 0])),
    "dtype-unknown": rank_file(named(KEY, dtype="PYOBJECT")),
    "dtype-wrong": rank_file(named(KEY, dtype="I64", shape=[2])),
    "shape-negative": rank_file(named(KEY, shape=[-4])),
    "shape-overflow": rank_file(named(KEY, shape=[1 << 33, 1 << 33, 4])),
    "shape-beyond-64-bits": rank_file(named(KEY, shape=[10**30])),
    "shape-no-whole-number": rank_file(named(KEY, shape=[4.5])),
    "shape-larger-than-bytes": rank_file(named(KEY, shape=[5])),
    "offset-nan": rank_file(named(KEY, data_offsets=[float("nan"), 16])),
    "duplicate-key": rank_file(tensors(TWICE)),
    "name-leads-out": rank_file(named("weight/../../escaped/0")),
    "name-with-control-characters": rank_file(named("weight/\x00\x1b[2J\r\n/0")),
    "name-of-a-megabyte": rank_file(named("w" * (1 << 20))),
    "names-100000": rank_file(many_names),
    "metadata-of-a-megabyte": rank_file(tensors({"__metadata__": {"run_id": "\x1b" * (1 << 20)}}, body=0)),
    "metadata-not-text": rank_file(tensors({"__metadata__": {"rank": 0}}, body=0)),
}


# Manifests: what they say under a right seal, and what is no manifest at all.


def sealed(edit: Callable[[dict], object]) -> Callable[[Path], Words]:
    def prepare(folder: Path) -> Words:
        edit_manifest(write_checkpoint(folder), edit)
        return inspected(folder)

    return prepare


def unsealed(content: Content) -> Callable[[Path], Words]:
    def prepare(folder: Path) -> Words:
        (write_checkpoint(folder) / "manifest.json").write_bytes(made(content, folder))
        return inspected(folder)

    return prepare


def of_lists(_: Path) -> bytes:
    return b"[" + b"[]," * 10_000_000 + b"[]]"


def said_twice(folder: Path) -> bytes:
    content = (write_checkpoint(folder / "other") / "manifest.json").read_bytes()
    return content.replace(b"{", b'{"step": 9,', 1)


def endless(folder: Path) -> Words:
    words = inspected_after_writing(folder)
    os.truncate(next(folder.glob("checkpoints/*/manifest.json")), 1 << 40)
    return words


def inspected_after_writing(folder: Path) -> Words:
    write_checkpoint(folder)
    return inspected(folder)


def file_name(name: str) -> Callable[[Path], Words]:
    return sealed(lambda manifest: manifest["files"][0].update(name=name))


def model(**fields: object) -> Callable[[Path], Words]:
    return sealed(lambda manifest: manifest["config"]["model"].update(fields))


def changed(**fields: object) -> Callable[[Path], Words]:
    return sealed(lambda manifest: manifest.update(fields))


def nested(depth: int) -> dict:
    inner: dict = {}
    for _ in range(depth):
        inner = {"a": inner}
    return inner


FILE_NAMES = {
    "parent": "../rank-00000.safetensors",
    "absolute": "/etc/passwd",
    "home": "~/rank-00000.safetensors",
    "backslash": "..\\rank-00000.safetensors",
    "nul": "rank-00000\0.safetensors",
    "newline": "rank-00000.safetensors\n",
    "url": "file:///etc/passwd",
    "empty": "",
    "dot": ".",
    "long": "rank-" + "0" * 100_000 + ".safetensors",
    "other-digits": "rank-\u0660\u0660\u0660\u0660\u0660.safetensors",
}
MANIFESTS = {
    "manifest-pickle": unsealed(payload),
    "manifest-nested": unsealed(b"[" * DEEP),
    "manifest-nested-objects": unsealed(b'{"a":' * DEEP),
    "manifest-nested-at-the-limit": unsealed(
        b'{"format": "llama_mcore/1", "a": ' + b"[" * 900 + b"]" * 900 + b"}"
    ),
    "manifest-long-number": unsealed(b"9" * 1_000_000),
    "manifest-duplicate-key": unsealed(said_twice),
    "manifest-nan": unsealed(b'{"format": "llama_mcore/1", "lr": NaN}'),
    "manifest-infinite": unsealed(b'{"format": "llama_mcore/1", "lr": 1e999}'),
    "manifest-of-lists": unsealed(of_lists),
    "manifest-zip": unsealed(zip_bomb),
    "manifest-of-a-terabyte": endless,
    "format-steers-the-terminal": unsealed(json.dumps({"format": "\x1b[2J\r" * 1000}).encode()),
    **{f"file-name-{name}": file_name(value) for name, value in FILE_NAMES.items()},
    "file-of-negative-size": sealed(lambda manifest: manifest["files"][0].update(bytes=-1)),
    "file-of-exabytes": sealed(lambda manifest: manifest["files"][0].update(bytes=1 << 62)),
    "files-100000": sealed(lambda manifest: manifest.update(files=manifest["files"] * 50_000)),
    "layers-10^15": model(num_layers=10**15),
    "layers-200": model(num_layers=200),
    "hidden-2^62": model(hidden_size=1 << 62),
    "hidden-10^30": model(hidden_size=10**30),
    "vocab-2^62": model(vocab_size=1 << 62),
    "layers-not-finite": model(num_layers=float("inf")),
    "model-is-a-list": sealed(lambda manifest: manifest["config"].update(model=[1])),
    "layout-2^62": changed(layout={"tp": 1 << 62, "dp": 1, "zero_stage": 1}),
    "layout-of-all-ranks": changed(layout={"tp": 1 << 62, "dp": 1 << 62, "zero_stage": 1}),
    "step-negative": changed(step=-4),
    "step-10^30": changed(step=10**30),
    "run-of-a-megabyte": changed(run_id="\x1b[31m" * 200_000),
    "run-of-half-a-character": changed(run_id="\ud800"),
    "config-nested": changed(config=nested(400)),
    "no-step": sealed(lambda manifest: manifest.pop("step")),
}


# Configurations, which a run reads with `--config`.


def config(text: str | bytes | Callable[[Path], str]) -> Callable[[Path], Words]:
    def prepare(folder: Path) -> Words:
        written = text(folder) if callable(text) else text
        (folder / "run.yaml").write_bytes(written.encode() if isinstance(written, str) else written)
        return ["train", "--config", str(folder / "run.yaml"), "--dry-run"]

    return prepare


def laughs(line: Callable[[int], str], first: str) -> str:
    """Ten of ten of ten: a terabyte in a screen of text."""
    return "\n".join([f"a0: &a0 {first}", *(f"a{n}: &a{n} {line(n - 1)}" for n in range(1, 12))])


def ten_of(n: int) -> str:
    return "[" + ", ".join([f"*a{n}"] * 10) + "]"


YAML = {
    "yaml-apply": config(lambda folder: f"run: !!python/object/apply:os.system ['touch {folder / CANARY}']"),
    "yaml-new": config(lambda folder: f"run: !!python/object/new:os.system ['touch {folder / CANARY}']"),
    "yaml-name": config("run: {dir: !!python/name:os.system }"),
    "yaml-module": config("run: !!python/module:this"),
    "yaml-own-tag": config("!run {dir: a}"),
    "yaml-odd-tag": config('run: {dir: !!timestamp "x"}'),
    "yaml-empty-number": config('run: {seed: !!int ""}'),
    "yaml-list-bomb": config(laughs(ten_of, "[x, x, x, x]")),
    "yaml-merge-bomb": config(laughs(lambda n: f"{{<<: {ten_of(n)}}}", "{x: 1}")),
    "yaml-recursive": config("run: &a {dir: *a}"),
    "yaml-nested": config("run: " + "[" * DEEP),
    "yaml-nested-blocks": config("".join(f"{' ' * n}a:\n" for n in range(1000))),
    "yaml-long-number": config("run: {seed: " + "9" * 100_000 + "}"),
    "yaml-long-hexadecimal": config("run: {seed: 0x" + "f" * 100_000 + "}"),
    "yaml-sexagesimal": config("run: {seed: " + ":".join(["59"] * 10_000) + "}"),
    "yaml-not-finite": config("run: {dir: a}\noptim: {lr: .nan}"),
    "yaml-duplicate-key": config("run: {dir: a}\nrun: {dir: b}"),
    "yaml-impossible-date": config("run: {dir: 2001-99-99}"),
    "yaml-of-two-megabytes": config("run:\n" + "  a: b\n" * 300_000),
    "yaml-many-items": config("run: {dir: [" + "x," * 50_000 + "]}"),
    "yaml-binary": config(bytes(range(256)) * 100),
    "yaml-half-a-character": config('run: {"\\ud800": 1}'),
    "yaml-long-key": config("run: {" + "k" * 500_000 + ": 1}"),
    "yaml-long-value": config("run: {no_key: " + "v" * 500_000 + "}"),
    "yaml-steers-the-terminal": config('run: {"\\e[2J": "\\e[2J"}'),
}


# Folders of Hugging Face, which `generate` reads.


def hugging_face(
    edit: Callable[[dict], object] = lambda config: None,
    files: dict[str, Content] | None = None,
) -> Callable[[Path], Words]:
    """A folder of the tiny model. `edit` changes its config.json; `files` are added, or replace its own."""

    def prepare(folder: Path) -> Words:
        import torch

        from llama_mcore.checkpoint.paths import WEIGHT
        from llama_mcore.convert.formats import huggingface
        from llama_mcore.convert.formats.native import NativeWeights
        from llama_mcore.convert.registry import WriteOptions

        (folder / "hf").mkdir()
        weights = NativeWeights(write_checkpoint(folder))
        huggingface.write(weights, folder / "hf", WriteOptions(torch.float32, (WEIGHT,)), lambda size: None)
        settings = json.loads((folder / "hf/config.json").read_text())
        edit(settings)
        (folder / "hf/config.json").write_text(json.dumps(settings))
        for name, content in (files or {}).items():
            (folder / "hf" / name).write_bytes(made(content, folder))
        return ["generate", "--checkpoint", str(folder / "hf"), "--prompt", "x"]

    return prepare


def index(*names: object) -> Callable[[Path], Words]:
    listed = {f"tensor{number}": name for number, name in enumerate(names)}
    content = json.dumps({"weight_map": listed}).encode()
    return hugging_face(files={"model.safetensors.index.json": content})


def setting(**fields: object) -> Callable[[Path], Words]:
    return hugging_face(lambda config: config.update(fields))


def only_pickles(folder: Path) -> Words:
    names = ("pytorch_model.bin", "model.pt", "training_args.bin")
    words = hugging_face(files=dict.fromkeys(names, payload))(folder)
    (folder / "hf/model.safetensors").unlink()
    return words


def pipe(folder: Path) -> Words:
    words = hugging_face()(folder)
    (folder / "hf/model.safetensors").unlink()
    os.mkfifo(folder / "hf/model.safetensors")
    return words


def in_two_files(folder: Path) -> Words:
    words = index("model.safetensors", "second.safetensors")(folder)
    (folder / "hf/second.safetensors").write_bytes((folder / "hf/model.safetensors").read_bytes())
    return words


def other_dtype(folder: Path) -> Words:
    from safetensors.torch import load_file, save_file

    words = hugging_face()(folder)
    path = folder / "hf/model.safetensors"
    save_file({name: tensor.long() for name, tensor in load_file(path).items()}, path)
    return words


HUGGING_FACE = {
    "hf-only-pickles": only_pickles,
    "hf-pickle-as-tensors": hugging_face(files={"model.safetensors": payload}),
    "hf-zip-bomb": hugging_face(files={"model.safetensors": zip_bomb}),
    "hf-pipe": pipe,
    **{f"hf-index-{name}": index(value) for name, value in FILE_NAMES.items()},
    "hf-index-number": index(7),
    "hf-index-list": index(["model.safetensors"]),
    "hf-index-is-a-list": hugging_face(files={"model.safetensors.index.json": b'{"weight_map": [1]}'}),
    "hf-index-nested": hugging_face(files={"model.safetensors.index.json": b"[" * DEEP}),
    "hf-tensor-in-two-files": in_two_files,
    "hf-whole-numbers": other_dtype,
    "hf-config-nested": hugging_face(files={"config.json": b'{"a":' * DEEP}),
    "hf-config-duplicate-key": hugging_face(files={"config.json": b'{"a": 1, "a": 2}'}),
    "hf-config-list": hugging_face(files={"config.json": b"[]"}),
    "hf-layers": setting(num_hidden_layers=10**15),
    "hf-layers-text": setting(num_hidden_layers="many"),
    "hf-hidden": setting(hidden_size=1 << 62),
    "hf-rope-list": setting(rope_parameters=["linear"]),
    "hf-rope-empty": setting(rope_parameters={"rope_type": "llama3"}),
    "hf-remote-code": setting(model_type="own", auto_map={"AutoModel": "code.Model"}),
}


# What is none of a checkpoint's business, and the valid ones: so that limits alone refuse nothing.


def pickles_beside(folder: Path) -> Words:
    checkpoint = write_checkpoint(folder)
    names = (
        "model.pt",
        ".metadata",
        "common.pt",
        "optim_states.pt",
        "a.npy",
        "a.npz",
        "__init__.py",
        "a.pkl",
    )
    for name in names:
        (checkpoint / name).write_bytes(payload(folder))
    return inspected(folder)


def sound_config(folder: Path) -> Words:
    write_tokens(folder / "train", [np.arange(1000)])
    data = [f"data.train={folder / 'train'}", "data.epochs=9999", "data.valid=null", "data.tokenizer=null"]
    settings = ["parallel.tp=1", "eval.interval=0", f"run.dir={folder / 'run'}"]
    return ["train", "--config", "tiny", "--dry-run", "--world-size", "1", *data, *settings]


SOUND = {
    "sound-checkpoint": inspected_after_writing,
    "sound-with-pickles-beside": pickles_beside,
    "sound-config": sound_config,
}
CASES = RANK_FILES | MANIFESTS | YAML | HUGGING_FACE | SOUND


def try_all(root: Path) -> dict[str, int]:
    """Exit codes. Case NAME lies in ROOT/NAME/, what the command printed in ROOT/NAME.txt."""
    # once, before the processes are forked
    import llama_mcore.checkpoint.inspect
    import llama_mcore.generate.generate  # noqa: F401

    for name in NAMES:
        get_format(name, "--from")
    found = {}
    for name, prepare in CASES.items():
        (root / name).mkdir()
        words = prepare(root / name)
        (found[name],) = exit_codes_of(1, run, root / f"{name}.txt", words)
    return found


def run(output: Path, words: Words) -> None:
    write_output_to(output)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    run_command(words)
