"""Settings that every test shares: one thread, fixed seeds and hypothesis cases, and `gpu` tests only where there is a GPU."""

import random

import hypothesis
import numpy as np
import pytest
import torch

from tests import ranks

torch.set_num_threads(1)

# The same cases on every run and machine, however slow it is; `--hypothesis-profile=explore` draws new ones.
patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, **patient)
hypothesis.settings.register_profile("explore", print_blob=True, **patient)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without CUDA. With it, several pytest-xdist workers share the GPU: most of the time is compiling."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test that draws without a seed of its own has the same numbers on every run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def pytest_sessionfinish() -> None:
    ranks.close_pools()
