"""Scaling laws: loss from size and data, and the best model for a budget. Imports no torch.

    N parameters, D training tokens, I tokens of inference over the model's life, C operations of training

    loss        L(N, D) = E + A / N^alpha + B / D^beta
    training    C = 6 N D         lifetime  6 N D + 2 N I    (Sardana et al. 2401.00448)

Along models of one loss, or of one training budget, from the compute-optimal one towards more data, put
R = (alpha A / N^alpha) / (beta B / D^beta). The lifetime cost at equal loss is stationary where

    3 D (R - 1) = I

The left side is 0 at the compute-optimal model, negative before it, and past it both factors grow with D on
either path: there is one solution for every I >= 0, and it is the minimum. It also says for how much
inference a model that exists would have been the right one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

RELATIVE_TOLERANCE = 1e-12
"""Relative tolerance of N and D of an optimum."""
PF_DAY = 1e15 * 86400


@dataclass(frozen=True)
class Allocation:
    """A model of so many parameters, trained on so many tokens."""

    params: float
    tokens: float

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.params

    @property
    def training_flops(self) -> float:
        return 6 * self.params * self.tokens

    def lifetime_flops(self, inference_tokens: float) -> float:
        return self.training_flops + 2 * self.params * inference_tokens


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token of the law's own data and tokenizer."""

    title: str
    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        return self.irreducible + self.a * params**-self.alpha + self.b * tokens**-self.beta

    def tokens_for(self, loss: float, params: float) -> float | None:
        """Training tokens that bring a model to `loss`; None if it is too small to reach it."""
        rest = loss - self.irreducible - self.a * params**-self.alpha
        return (self.b / rest) ** (1 / self.beta) if rest > 0 else None

    def optimum(self, flops: float) -> Allocation:
        """Least loss for a training budget (Hoffmann et al., eq. 4)."""
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        params = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return Allocation(params, flops / (6 * params))

    def optimum_of_loss(self, loss: float) -> Allocation:
        """Least training for a loss above the irreducible one."""
        share = self.beta / (self.alpha + self.beta)  # of what is reducible, left to the parameters
        rest = loss - self.irreducible
        return Allocation(
            (self.a / (rest * share)) ** (1 / self.alpha), (self.b / (rest * (1 - share))) ** (1 / self.beta)
        )

    def inference_it_is_best_for(self, model: Allocation) -> float:
        """The I at which no model of equal loss costs less; negative for one larger than compute-optimal."""
        params_side = self.alpha * self.a * model.params**-self.alpha
        tokens_side = self.beta * self.b * model.tokens**-self.beta
        return 3 * model.tokens * (params_side / tokens_side - 1)

    def cheapest_of_loss(self, loss: float, inference_tokens: float) -> Allocation:
        """Least lifetime cost for a loss above the irreducible one."""
        return self._best_for(inference_tokens, self.optimum_of_loss(loss), lambda d: self._at_loss(loss, d))

    def cheapest_of_budget(self, flops: float, inference_tokens: float) -> Allocation:
        """The model whose training takes the whole budget and which is the cheapest of its loss."""
        return self._best_for(
            inference_tokens, self.optimum(flops), lambda tokens: Allocation(flops / (6 * tokens), tokens)
        )

    def cheapest_within(self, loss: float, flops: float, inference_tokens: float) -> Allocation | None:
        """Least lifetime cost among models of that loss within the training budget; None if there is none.

        From the compute-optimal model on, every token makes training dearer and, until its minimum, the
        lifetime cheaper: if the minimum does not fit the budget, the last model that does is the best.
        """
        least = self.optimum_of_loss(loss)
        best = self.cheapest_of_loss(loss, inference_tokens)
        if best.training_flops <= flops:
            return best
        if least.training_flops > flops:
            return None
        tokens = _root(lambda d: self._at_loss(loss, d).training_flops - flops, least.tokens)
        return self._at_loss(loss, tokens)

    def _best_for(
        self, inference_tokens: float, least: Allocation, path: Callable[[float], Allocation]
    ) -> Allocation:
        if inference_tokens == 0:
            return least
        return path(_root(lambda d: self.inference_it_is_best_for(path(d)) - inference_tokens, least.tokens))

    def _at_loss(self, loss: float, tokens: float) -> Allocation:
        rest = loss - self.irreducible - self.b * tokens**-self.beta
        return Allocation((self.a / rest) ** (1 / self.alpha), tokens)


@dataclass(frozen=True)
class PowerLaw:
    """A law for the best size only: N = params * (C / flops)^exponent, and D = C / 6N."""

    title: str
    params: float
    flops: float
    exponent: float

    def optimum(self, flops: float) -> Allocation:
        params = self.params * (flops / self.flops) ** self.exponent
        return Allocation(params, flops / (6 * params))


def kaplan_loss(params: float, tokens: float) -> float:
    """Kaplan et al. (2001.08361), eq. 1.5 with Table 2's constants, on WebText2."""
    alpha_n, alpha_d, n_c, d_c = 0.076, 0.103, 6.4e13, 1.8e13
    return ((n_c / params) ** (alpha_n / alpha_d) + d_c / tokens) ** alpha_d


DEFAULT_LAW = "epoch"
LAWS: dict[str, ParametricLaw | PowerLaw] = {
    "epoch": ParametricLaw(
        "Epoch's refit of approach 3 (Besiroglu et al. 2404.10102)", 1.8172, 482.01, 2085.43, 0.3478, 0.3658
    ),
    # Exponents: Hoffmann et al. (2203.15556), Table 2. Where the lines lie: the 67B rows of Tables 3 and A3.
    "hoffmann-1": PowerLaw("Hoffmann, approach 1: minima over training curves", 67e9, 5.76e23, 0.50),
    "hoffmann-2": PowerLaw("Hoffmann, approach 2: IsoFLOP profiles", 67e9, 6.88e23, 0.49),
    "hoffmann-3": ParametricLaw("Hoffmann, approach 3, constants as printed", 1.69, 406.4, 410.7, 0.34, 0.28),
    "hoffmann-3-unrounded": ParametricLaw(
        "Hoffmann, approach 3, constants of the TeX source", 1.6934, 406.4, 410.7, 0.3392, 0.2849
    ),
    # Table 6 of the paper: N without embeddings.
    "kaplan": PowerLaw("Kaplan et al. (2001.08361)", 1.3e9, PF_DAY, 0.73),
}
PARAMETRIC_LAWS = {name: law for name, law in LAWS.items() if isinstance(law, ParametricLaw)}
ROUNDING = (
    "Hoffmann's approach 3 as printed is known to mislead: at Chinchilla's 5.76e23 FLOPs its rounded "
    "constants ask for 93 tokens per parameter, approaches 1 and 2 and Epoch's refit for 18 to 25."
)


def _root(function: Callable[[float], float], low: float) -> float:
    """Zero of a growing function that is at most 0 at `low` > 0, within RELATIVE_TOLERANCE."""
    high = 2 * low
    while function(high) < 0:
        low, high = high, 2 * high
    while high > low * (1 + RELATIVE_TOLERANCE):
        middle = math.sqrt(low * high)
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return high
