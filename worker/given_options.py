"""What the commands without servers are given, checked as the service checks it."""

from collections.abc import Mapping

from pydantic import ValidationError

from service.datasets.rows.forms import Form
from service.datasets.rows.options import RowOptions
from service.http.errors import field_error
from service.plan.parameters import Parameters
from winnow.options import Reading, assigned
from worker.errors import ParameterError


def parameters_of(settings: list[str], named: Mapping[str, str] | None = None) -> Parameters:
    """The parameters of a job from `--set NAME=VALUE`, on top of those that have an option of their own.

    Raises:
        ParameterError: one of them is not known, or has a value that it cannot have.
    """
    try:
        given = assigned(settings, named)
    except ValueError as error:
        raise ParameterError(str(error)) from error
    try:
        return Parameters(**given)
    except ValidationError as error:
        refused = [field_error(e) for e in error.errors()]
        raise ParameterError("\n  ".join(f"--set {each['param']}: {each['message']}" for each in refused)) from error


def row_options_of(reading: Reading) -> RowOptions:
    """How the rows of a file are read.

    Raises:
        ParameterError: there is no such format.
        Unprocessable: the columns or the template cannot be used.
    """
    try:
        form = Form(reading.format or Form.AUTO)
    except ValueError as error:
        raise ParameterError(f"--format {reading.format}: expected one of {', '.join(Form)}") from error
    return RowOptions.parse(form, reading.columns, reading.template)
