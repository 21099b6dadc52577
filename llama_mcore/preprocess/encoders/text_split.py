"""Long texts in parts that can be encoded one by one."""

from collections.abc import Iterator

from sentencepiece.sentencepiece_model_pb2 import ModelProto

# SentencePiece's mark for a space.
SPACE_MARK = "\u2581"
# Bounds what an encoder needs beside the tokens: gigatoken at most 30 bytes a byte of text, sentencepiece 50.
PART_CHARACTERS = 4 * 1024 * 1024


class TextCutter:
    """Cuts only between two characters that no piece of the vocabulary holds side by side.

    A token is a piece, so none reaches across such a cut and the ids of the parts, one after the other, are
    those of the whole. Only the first part has the space that SentencePiece puts before a text.
    """

    def __init__(self, model: ModelProto, part_characters: int) -> None:
        self._neighbours = {
            pair for piece in model.pieces if piece.type == piece.NORMAL for pair in _pairs(piece.piece)
        }
        self._part_characters = part_characters

    def cut(self, text: str) -> Iterator[str]:
        """Parts of about `part_characters`; longer where no cut is possible. At least one, even if empty."""
        start = 0
        for end in self._cuts(text):
            yield text[start:end]
            start = end
        yield text[start:]

    def _cuts(self, text: str) -> Iterator[int]:
        position = self._part_characters
        while position < len(text):
            if text[position - 1 : position + 1].replace(" ", SPACE_MARK) in self._neighbours:
                position += 1
            else:
                yield position
                position += self._part_characters


def _pairs(piece: str) -> Iterator[str]:
    return (piece[i : i + 2] for i in range(len(piece) - 1))
