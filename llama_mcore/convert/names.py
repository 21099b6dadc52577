"""What other formats call a parameter: tables from model/parameters.py, and their inverse.

The canonical name is megatron-core's. A parameter that megatron-core fuses has several names elsewhere, in
the order of the parts that fused_weights.py makes.
"""

from llama_mcore.model.parameters import PARAMETERS, pattern_of


class NameTable:
    """Looks up the names of a format from the canonical one, and back. Raises KeyError for a strange name."""

    def __init__(self, table: dict[str, tuple[str, ...]]) -> None:
        """`{}` in names stands for the number of the layer."""
        self._to = table
        self._from = {part: canonical for canonical, parts in table.items() for part in parts}

    def parts(self, canonical: str) -> tuple[str, ...]:
        """The format's names of what a canonical parameter is split into."""
        pattern, layer = pattern_of(canonical)
        return tuple(part.format(layer) for part in self._to[pattern])

    def canonical(self, part: str) -> str:
        """The canonical parameter that a name of the format is a part of."""
        pattern, layer = pattern_of(part)
        return self._from[pattern].format(layer)


HUGGING_FACE = NameTable({parameter.name: parameter.hugging_face for parameter in PARAMETERS})
META = NameTable({parameter.name: parameter.meta for parameter in PARAMETERS})
