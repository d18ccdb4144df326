"""Rows gathered over real processes, and their gradients."""

import torch
from accelerate import Accelerator, debug_launcher

from ballad_hf.training.collectives import gather_rows


def check_on_a_process():
    rank = Accelerator(cpu=True).process_index
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = gather_rows(rows)
    assert gathered[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    # Process r weighs row i by 10 ** r * (i + 1); the gradient of a row is the sum over both processes.
    (gathered * 10.0**rank * torch.arange(1.0, 5.0)[:, None]).sum().backward()
    assert rows.grad[:, 0].tolist() == ([11.0, 22.0] if rank == 0 else [33.0, 44.0])


def test_a_row_gets_the_gradients_of_all_processes():
    debug_launcher(check_on_a_process, num_processes=2)


def test_one_process_keeps_its_rows():
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
