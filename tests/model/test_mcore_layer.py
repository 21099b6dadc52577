"""megatron-core's own layer computes the same as ours from the same weights: it is a fair comparison."""

import pytest

from tests.model.cases import mcore_layer
from tests.model.conftest import OnRanks

pytestmark = pytest.mark.process

# fp32 rounds by 6e-8; sums of some hundred products stay two orders of magnitude below this.
TOLERANCE = 1e-5


@pytest.mark.parametrize(("tp", "name"), [(tp, name) for tp in (1, 2) for name in mcore_layer.names(tp)])
def test_logits_and_gradients(on_ranks: OnRanks, tp: int, name: str) -> None:
    for errors in on_ranks(mcore_layer, tp)[name]:
        assert max(errors.values()) < TOLERANCE, errors
