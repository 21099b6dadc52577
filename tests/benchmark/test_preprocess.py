import ast
import itertools

import pytest

from llama_mcore.benchmark.preprocess import Samples, python_sources, summarize


def test_the_best_round_counts_and_bars_are_judged() -> None:
    found = {
        "bare encoder": Samples([1.0, 3.0]),
        "tool, gigatoken": Samples([4.0, 1.25], [10**9, 2 * 10**9]),
        "tool, sentencepiece": Samples([10.0], [10**8]),
    }
    result = summarize(100_000_000, 7, found, 2, 0.0)
    assert result.quantities == pytest.approx(
        {
            "tool, gigatoken / sentencepiece": 8.0,
            "tool / bare encoder": 0.8,
            "peak memory of the tool, GB": 2.0,
        }
    )
    assert [bar.holds(result.quantities[bar.quantity]) for bar in result.bars] == [True, True, False]
    assert result.figure.startswith("80.0 MB/s")
    assert "not to be trusted" in summarize(100, 7, found, 2, 0.5).notes[0]


def test_the_corpus_is_distinct_sources_of_this_python() -> None:
    texts = list(itertools.islice(python_sources(300_000), 1000))
    assert 300_000 <= sum(len(text.encode()) for text in texts) < 2_000_000
    assert len(set(texts)) == len(texts)
    ast.parse(texts[0])
