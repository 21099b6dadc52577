"""Worker: commands of the product on runs with two sources, each in ranks of its own.

    python tests/train/two_sources.py FOLDER JOBS.json

JOBS.json: a list of (name, ranks, command line). What a job printed goes to FOLDER/NAME.txt, exit codes
of all to FOLDER/exit_codes.json.
"""

import json
import sys
from pathlib import Path

from llama_mcore import cli
from tests.forked import exit_codes_of, write_output_to


def main() -> None:
    import llama_mcore.train.loop  # noqa: F401  once, before the ranks are forked

    folder = Path(sys.argv[1])
    exit_codes = {
        name: exit_codes_of(ranks, lambda name=name, words=words: run(folder / f"{name}.txt", words))
        for name, ranks, words in json.loads(Path(sys.argv[2]).read_text())
    }
    (folder / "exit_codes.json").write_text(json.dumps(exit_codes))


def run(output: Path, words: list[str]) -> None:
    write_output_to(output)
    sys.argv = ["llama-mcore", *words]
    cli.main()


if __name__ == "__main__":
    main()
