"""Bytes that a forward leaves behind for its backward."""

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


def kept_bytes(forward: Callable[[], Tensor], excluded: Iterable[Tensor]) -> tuple[int, Tensor]:
    """Run `forward` and count what autograd then keeps; return the bytes and the answer with its graph.

    Counted are storages, each whole and once, of what plain autograd and autograd.Functions save, without
    those of `excluded`, which are there anyway (the parameters). What was saved only for a part of the graph
    that is gone by then (a recomputed region) does not count. No copy is made.
    """
    sizes: dict[StorageWeakRef, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[StorageWeakRef(storage)] = storage.nbytes()
        # An output itself would refer to the node that keeps it, and neither would ever be freed.
        return tensor.detach()

    with saved_tensors_hooks(note, _unchanged):
        answer = forward()
    there_anyway = {StorageWeakRef(tensor.untyped_storage()) for tensor in excluded}
    # A weak reference holds the storage's identity, so a freed address is not mistaken for its successor.
    kept = sum(
        size for reference, size in sizes.items() if reference not in there_anyway and not reference.expired()
    )
    return kept, answer


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
