"""The bytes that benchmarks/gpu_roofline.py counts are those that the emulated kernels touch."""

import sys
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest
import torch
from cuda_cases import to_numpy
from op_cases import random_layers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
gpu_roofline = pytest.importorskip("gpu_roofline")

pytestmark = pytest.mark.skipif(bool(cuda_emulator.why_not()), reason=cuda_emulator.why_not() or "-")


@pytest.mark.parametrize(("tokens", "multiprocessors"), [(32, 108), (64, 1)])  # split, and not
@pytest.mark.parametrize(("heads", "width"), [(2, 96), (1, 70), (0, 33), (1, 0)])
def test_each_launch_moves_what_the_model_says(tokens, multiprocessors, heads, width):
    hidden, head_size, sequences = 256, 64, 2
    weights = [to_numpy(w) for w in random_layers([heads], [width], head_size, hidden, torch.float16)]
    states = np.ones((sequences, tokens // sequences, hidden), np.float16)
    expected = gpu_roofline.layer_launches(
        tokens, sequences, hidden, heads, head_size, width, multiprocessors, cuda_emulator.Kernels().plan
    )
    call = ("traffic_of_encoder", {"dtype": "float16", "hidden_states": states, "mask": None, "weights": weights,
                                   "num_heads": [heads], "multiprocessors": multiprocessors})  # fmt: skip
    (answer,) = cuda_emulator.run([call], "races")
    assert not isinstance(answer, str), answer
    got = [(launch["read"], launch["written"]) for launch in answer[0]]
    assert got[-len(expected) :] == [(launch.read, launch.written) for launch in expected]
    assert len(got) == 2 + len(expected)  # count and gather come first
