import matplotlib
import pytest
import torch

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _float64_and_seed():
    """Every test runs in float64 from one seed and leaves no global setting behind."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # test workers share the cores, and the tensors are small
    yield
    torch.set_default_dtype(before)
