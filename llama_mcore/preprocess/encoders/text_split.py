"""Splitting of long texts into chunks that can be encoded one by one."""

from collections.abc import Iterator

from sentencepiece.sentencepiece_model_pb2 import ModelProto

# SentencePiece's mark for a space.
SPACE_MARK = "\u2581"
# Bounds what an encoder needs beside the tokens: gigatoken at most 30 bytes a byte of text, sentencepiece 50.
CHUNK_CHARACTERS = 4 * 1024 * 1024


class TextSplitter:
    """Splits only between two characters that no piece of the vocabulary holds side by side.

    A token is a piece, so none reaches across such a place and the ids of the chunks, one after the other,
    are those of the whole text. Only the first chunk has the space that SentencePiece puts before a text.
    """

    def __init__(self, model: ModelProto, chunk_characters: int) -> None:
        self._neighbours = {
            pair for piece in model.pieces if piece.type == piece.NORMAL for pair in _pairs(piece.piece)
        }
        self._chunk_characters = chunk_characters

    def split(self, text: str) -> Iterator[str]:
        """Chunks of about `chunk_characters`, longer where no split is possible; one of the empty text."""
        start = 0
        for end in self._ends(text):
            yield text[start:end]
            start = end
        yield text[start:]

    def _ends(self, text: str) -> Iterator[int]:
        position = self._chunk_characters
        while position < len(text):
            if text[position - 1 : position + 1].replace(" ", SPACE_MARK) in self._neighbours:
                position += 1
            else:
                yield position
                position += self._chunk_characters


def _pairs(piece: str) -> Iterator[str]:
    return (piece[i : i + 2] for i in range(len(piece) - 1))
