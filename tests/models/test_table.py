"""What the table of models says without torch is what the models are."""

import pytest

from pneumo.models import MODELS, Settings, load


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("size", [16, 128])
def test_parameters_are_those_of_the_built_model(name: str, size: int) -> None:
    model = load(name)(Settings(size, 1e-3)).build()
    assert MODELS[name].parameters(size) == sum(p.numel() for p in model.parameters())
