"""The base of every configuration section: frozen, typed, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a run's YAML file. Each package owns the section it reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
