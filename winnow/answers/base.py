"""What every answer of the service is."""

from collections.abc import KeysView
from inspect import get_annotations
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticUndefined


class Answer(BaseModel):
    """Fields of an answer, as attributes and as `answer["name"]`.

    An old client understands a newer service: a field that it does not know is kept (`answer["name"]`), and a value that is new
    in an enumeration is a string like the others. A field that an older service does not send is None.
    """

    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True, use_attribute_docstrings=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in get_annotations(cls):
            if not name.startswith("_") and getattr(cls, name, PydanticUndefined) is PydanticUndefined:
                setattr(cls, name, None)
        super().__init_subclass__(**kwargs)

    def __getitem__(self, name: str) -> Any:
        """
        Raises:
            KeyError: the service sent no such field.
        """
        for attribute in (name, f"{name}_"):  # a name that a model has itself is followed by an underscore
            if attribute in self.model_fields_set:
                return getattr(self, attribute)
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or the default where the service sent none."""
        try:
            return self[name]
        except KeyError:
            return default

    def __contains__(self, name: object) -> bool:
        return name in self.model_fields_set or f"{name}_" in self.model_fields_set

    def keys(self) -> KeysView[str]:
        """The names of the fields that were sent."""
        return self.to_dict().keys()

    def to_dict(self) -> dict[str, Any]:
        """The fields that were sent, as JSON has them."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)
