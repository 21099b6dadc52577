"""llama_mcore.model.parameters says what the built model holds, name by name and in its order."""

import pytest

from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.model.sharding import parameter_shapes
from tests.model.building import model_config
from tests.model.cases import initialisation
from tests.model.conftest import OnRanks


@pytest.mark.process
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", initialisation.NAMES)
def test_shapes_are_those_of_the_built_model(on_ranks: OnRanks, name: str, tp: int) -> None:
    shapes = parameter_shapes(model_config(**initialisation.MODELS.get(name, {})))
    expected = {parameter: list(shape) for parameter, shape in shapes.items()}
    for found in on_ranks(initialisation, tp)[name]:
        built = {parameter: shape for parameter, (shape, _) in found.items()}
        assert built == expected
        # megatron-core's own layer registers its norms elsewhere
        if name != initialisation.MCORE:
            assert list(built) == list(expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_add_up_to_the_number_of_parameters(preset: str) -> None:
    model = ModelConfig(**PRESETS[preset])
    assert sum(shape.numel() for shape in parameter_shapes(model).values()) == model.num_params()


@pytest.mark.parametrize(("preset", "billions"), [("7b", 6.7), ("13b", 13.0), ("33b", 32.5), ("65b", 65.2)])
def test_parameter_counts_of_the_paper(preset: str, billions: float) -> None:
    """Table 2, which cuts 65.29 to 65.2."""
    assert int(ModelConfig(**PRESETS[preset]).num_params() / 1e8) / 10 == billions
