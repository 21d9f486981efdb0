"""No changed bit and no overwritten block of a checkpoint is accepted."""

import random

import pytest
import torch
from figures import report_figure

import flows
from flows.training import CheckpointError, Stage, Trainer, load_checkpoint
from flows.training.callbacks import Reporting


def changed(data, numbers, block):
    """Flip a bit, or overwrite a block with zeros or noise."""
    data = bytearray(data)
    if block:
        length = numbers.choice([16, 64, 512, 4096])
        start = numbers.randrange(max(1, len(data) - length))
        data[start : start + length] = numbers.choice([bytes(length), numbers.randbytes(length)])[: len(data) - start]
    else:
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    return bytes(data)


def accepted(folder, flips, blocks):
    """How many changes of the files of a run are read without an error."""
    stage = Stage(flows.objectives.FlowMatching(), steps=2, batch_size=16)
    dataset = flows.datasets.EightGaussians(num_test=20, num_validation=20)
    flow = flows.CNF(flows.fields.MLP((2,), hidden=(8, 8)))
    quiet = Reporting(progress_bar=False, plot_every=None)
    Trainer(flow, dataset, {"flow_matching": stage}, reporting=quiet, output_dir=folder).fit()
    numbers, count = random.Random(0), 0
    for name in ("last", "best"):
        whole = (folder / f"checkpoints/{name}.pt").read_bytes()
        load_checkpoint(folder / f"checkpoints/{name}.pt")
        damaged = folder / "damaged.pt"
        for number in range((flips + blocks) // 2):
            data = changed(whole, numbers, block=number >= flips // 2)
            if data == whole:
                continue
            damaged.write_bytes(data)
            try:
                load_checkpoint(damaged)
            except CheckpointError:
                continue
            count += 1
    return count


def test_a_few_changes_are_refused(tmp_path):
    torch.set_default_dtype(torch.float32)
    assert accepted(tmp_path / "run", flips=30, blocks=30) == 0


@pytest.mark.slow
def test_all_changes_are_refused(tmp_path):
    torch.set_default_dtype(torch.float32)
    count = accepted(tmp_path / "run", flips=400, blocks=800)
    report_figure(f"damaged checkpoints: 400 flipped bits and 800 overwritten blocks, {count} accepted")
    assert count == 0
