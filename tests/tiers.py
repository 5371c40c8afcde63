"""Which values of a parameter are tested when: at once, in CI, before a release."""

import pytest

exhaustive, slow = pytest.mark.exhaustive, pytest.mark.slow


def tiers(values, *, in_ci=(), quick=()):
    """The values, tuples of several parameters; what has no tier is exhaustive."""
    values, quick, in_ci = list(values), list(quick), list(in_ci)
    assert all(value in values for value in [*quick, *in_ci])

    def param(value):
        marks = [] if value in quick else slow if value in in_ci else exhaustive
        return pytest.param(*(value if type(value) is tuple else [value]), marks=marks)

    return [param(value) for value in values]
