"""Report on a trained tokenizer, measured on the model itself: compression, digits, unknown characters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sentencepiece

_NUM_LONGEST = 10
_SPACE = "\u2581"
_NUMBER = "1984"
# Characters of many scripts and planes: no small vocabulary has them all.
_RARE = "\U0001f9ea\u0e20\u10d0\u16a0\u2d30\ua000\U00010330\U00020000"


@dataclass(frozen=True)
class SourceReport:
    """Measurements on sampled lines of a source, without their ends."""

    name: str
    sample_bytes: int
    tokens: int
    bytes_per_token: float
    byte_tokens: int
    """Tokens that stand for one byte of a character that the vocabulary lacks."""
    lines_changed: int
    """Lines whose tokens decode to something else, apart from U+2581 that comes back as a space."""


@dataclass(frozen=True)
class TokenizerReport:
    sources: list[SourceReport]
    longest_pieces: list[str]
    digits_are_single: bool
    """True if no piece holds a digit and anything else, and 1984 is four tokens."""
    unknown_characters: str
    """Characters outside the vocabulary that were tried."""
    unknown_come_back: bool
    """True if each becomes the bytes of its UTF-8, and these decode to it again."""

    def table(self) -> str:
        """The report as text for a terminal."""
        width = max(len("source"), *(len(source.name) for source in self.sources))
        lines = [f"{'source':<{width}}  {'sample':>9}  bytes/token  byte tokens  lines changed"]
        for source in self.sources:
            sample = f"{source.sample_bytes / 1e6:.2f} MB"
            tokens = f"{source.bytes_per_token:>11.3f}  {source.byte_tokens:>11,}"
            lines.append(f"{source.name:<{width}}  {sample:>9}  {tokens}  {source.lines_changed:>13,}")
        unknown = f"{len(self.unknown_characters)} tried"
        return "\n".join(
            [
                *lines,
                f"longest pieces: {' '.join(self.longest_pieces)}",
                f"digits are single tokens: {_yes(self.digits_are_single)}",
                f"unknown characters survive as bytes: {_yes(self.unknown_come_back)} ({unknown})",
            ]
        )


def report_on(model: bytes, samples: Mapping[str, Sequence[bytes]]) -> TokenizerReport:
    """Report on a serialized SentencePiece model, with `samples` of lines by source."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [
        processor.id_to_piece(token) for token in range(processor.vocab_size()) if _is_text(processor, token)
    ]
    known = set("".join(pieces))
    sampled = (line.decode() for lines in samples.values() for line in lines)
    unknown = _unknown_characters(known, [_RARE, *sampled])
    return TokenizerReport(
        [_report_source(processor, name, lines) for name, lines in samples.items()],
        sorted((piece for piece in pieces if set(piece) != {_SPACE}), key=len, reverse=True)[:_NUM_LONGEST],
        _digits_are_single(processor, pieces),
        unknown,
        all(_comes_back_through_bytes(processor, character) for character in unknown),
    )


def _report_source(
    processor: sentencepiece.SentencePieceProcessor, name: str, lines: Sequence[bytes]
) -> SourceReport:
    texts = [line.decode() for line in lines]
    encoded = processor.encode(texts)
    num_tokens = sum(map(len, encoded))
    sample_bytes = sum(map(len, lines))
    changed = sum(
        back != text.replace(_SPACE, " ") for back, text in zip(processor.decode(encoded), texts, strict=True)
    )
    byte_tokens = sum(processor.is_byte(token) for ids in encoded for token in ids)
    return SourceReport(
        name, sample_bytes, num_tokens, sample_bytes / max(num_tokens, 1), byte_tokens, changed
    )


def _is_text(processor: sentencepiece.SentencePieceProcessor, token: int) -> bool:
    return not (processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token))


def _digits_are_single(processor: sentencepiece.SentencePieceProcessor, pieces: Iterable[str]) -> bool:
    no_piece_joins = not any(len(piece) > 1 and any(map(_is_digit, piece)) for piece in pieces)
    return no_piece_joins and processor.encode(_NUMBER, out_type=str)[-4:] == list(_NUMBER)


def _is_digit(character: str) -> bool:
    """True for the digits that SentencePiece splits: ASCII and full-width ones."""
    return "0" <= character <= "9" or "\uff10" <= character <= "\uff19"


def _unknown_characters(known: set[str], texts: Iterable[str]) -> str:
    """Up to 100 characters of the texts that no piece holds, apart from the space."""
    unknown: dict[str, None] = {}
    for text in texts:
        unknown.update(dict.fromkeys(c for c in text if c not in known and c != " "))
        if len(unknown) >= 100:
            break
    return "".join(unknown)[:100]


def _comes_back_through_bytes(processor: sentencepiece.SentencePieceProcessor, character: str) -> bool:
    ids = processor.encode(character)
    expected = [f"<0x{byte:02X}>" for byte in character.encode()]
    pieces = [processor.id_to_piece(token) for token in ids]
    return pieces[-len(expected) :] == expected and processor.decode(ids) == character


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"
