"""How much memory does a table take that is read in parts?

A table of 2 GB is written into a temporary folder, as .npy and as Parquet, trained on in a process of its own, and
removed. Times are CPU times. Memory is the largest resident memory of that process above what it has before the data
are opened.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

COLUMNS, BLOCK = 20, 250_000


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `large_table` to the benchmarks."""
    parser = commands.add_parser("large_table", help="memory and speed of training on a table that is read in parts")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write, train, and print a table."""
    blocks = max(1, round(options.gigabytes * 2**30 / (8 * COLUMNS * BLOCK)))
    folder = Path(tempfile.mkdtemp(prefix="large_table_"))
    print(f"{blocks * BLOCK:,} rows of {COLUMNS} columns, {options.steps} steps of {options.batch_size} rows")
    print("file      on disk   first pass   rows/s   peak memory above the start")
    try:
        for kind, write in (("npy", write_npy), ("parquet", write_parquet)):
            path = folder / f"rows.{kind}"
            write(path, blocks)
            results = multiprocessing.get_context("spawn").Queue()
            arguments = (str(path), options.steps, options.batch_size, results)
            process = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
            process.start()
            first, speed, memory = results.get()
            process.join()
            size = path.stat().st_size / 2**20
            print(f"{kind:<8}{size:>6,.0f} MiB {first:>9.1f} s {speed:>10,.0f} {memory:>10,.0f} MiB", flush=True)
            path.unlink()
    finally:
        shutil.rmtree(folder)


def rows_of(block: int) -> np.ndarray:
    """Return some rows of the table."""
    generator = np.random.default_rng(block)
    rows = generator.normal(size=(BLOCK, COLUMNS))
    rows[:, 1] += np.sin(3 * rows[:, 0])
    return rows


def write_npy(path: Path, blocks: int) -> None:
    """Write the table as an array."""
    values = np.lib.format.open_memmap(path, "w+", np.float64, (blocks * BLOCK, COLUMNS))
    for block in range(blocks):
        values[block * BLOCK : (block + 1) * BLOCK] = rows_of(block)
    values.flush()


def write_parquet(path: Path, blocks: int) -> None:
    """Write the table in row groups of 50,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(f"c{i}", pa.float64()) for i in range(COLUMNS)])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for block in range(blocks):
            writer.write_table(pa.table(list(rows_of(block).T), schema=schema), row_group_size=50_000)


def train(path: str, steps: int, batch_size: int, results: multiprocessing.Queue) -> None:
    """Train on the file; put the seconds of the first pass, rows per second, and the memory."""
    import torch

    import flows

    torch.manual_seed(0)
    flow = flows.CNF(flows.fields.MLP((COLUMNS,)), transform=flows.transforms.Standardise((COLUMNS,)))
    objective, optimizer = flows.objectives.FlowMatching(), torch.optim.Adam(flow.parameters())
    small = flows.datasets.Batch(torch.randn(batch_size, COLUMNS, dtype=torch.float64))
    objective(flow, small).loss.backward()  # loads what a step needs
    before, started = resident("VmRSS"), time.process_time()
    data = flows.datasets.LargeTable(path)
    flow.transform.fit_moments(*data.moments())
    data.fingerprint()
    first, started = time.process_time() - started, time.process_time()
    stream = data.train_stream(batch_size, torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        objective(flow, next(stream)).loss.backward()
        optimizer.step()
    speed = steps * batch_size / (time.process_time() - started)
    results.put((first, speed, resident("VmHWM") - before))


def resident(name: str) -> float:
    """Return a figure of this process's memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
