"""Which back ends of the aggregation can be tested here."""

from megagnn.ops.backends import BACKENDS, aggregation_backend


def installed_backends() -> tuple[list[str], dict[str, str]]:
    """Names of the back ends that are here, and why each of the others is not."""
    installed, missing = [], {}
    for name in BACKENDS:
        try:
            aggregation_backend(name)
            installed.append(name)
        except ValueError as error:
            missing[name] = str(error)
    return installed, missing
