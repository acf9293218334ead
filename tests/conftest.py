"""Settings that every test shares: one thread, fixed hypothesis cases, and `gpu` tests only where there is a GPU."""

import hypothesis
import pytest
import torch

from tests import ranks

torch.set_num_threads(1)

# The same cases on every run and machine; `--hypothesis-profile=explore` draws new ones.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without CUDA. With it, several pytest-xdist workers share the GPU: most of the time is compiling."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish() -> None:
    ranks.close_pools()
