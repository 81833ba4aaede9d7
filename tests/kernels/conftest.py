"""What all tests of kernels have."""

import pytest


@pytest.fixture(autouse=True)
def with_helpers(helpers: None) -> None:
    """Kernels share their work out, as they do when they serve."""
