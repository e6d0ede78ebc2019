"""The shape of a model, from the configuration in its folder."""

from pathlib import Path

from service.models.configs import ADAPTER_CONFIG, CONFIG, entries, read_adapter_config, read_config
from service.plan.operations import Shape


def shape_in(folder: Path, base: Shape | str | None = None) -> Shape | str:
    """The shape of the model in a folder, or why it is unknown; of an adapter, with the shape of its base, or why that is."""
    try:
        if base is None:
            return Shape.of_config(entries(read_config(folder / CONFIG)))
        adapter = read_adapter_config(folder / ADAPTER_CONFIG)
        if adapter.target_modules is None:
            raise ValueError(f"its {ADAPTER_CONFIG} has no target_modules")
        return base if isinstance(base, str) else base.with_adapters(adapter.r, adapter.target_modules)
    except ValueError as error:
        return f"of the model, {error}"
