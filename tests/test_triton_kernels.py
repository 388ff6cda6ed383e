"""The Triton kernels, interpreted on the CPU: whole models, one search for all lengths, and no byte outside.

test_backends.py has the cases of single ops and encoders. Nothing here runs on a GPU; test_triton_compile.py compiles
the kernels for GPUs ahead of time.
"""

import contextlib
import copy
from typing import NamedTuple

import pytest
import torch
from cuda_cases import TORCH, Case, attention, encoder, linear, rows
from models import KEPT, QUERY_GONE, ROWS_ZERO, prune, prune_dimensions, tiny_bert, tiny_config
from op_cases import assert_as_exact_as_torch
from triton_interpreter import Caged, broken_kernels, triton_kernels

import packedbert


def pruned_model(norm="layer_norm"):
    """Of 4 heads of 16, 2 of 8 are left in the first layer; the second has neither heads nor FFN rows."""
    model = tiny_bert(config=tiny_config(hidden_size=64, layer_norm_type=norm))
    prune(model, [[KEPT, ROWS_ZERO] * 2, [ROWS_ZERO] * 4], [[KEPT, ROWS_ZERO] * 20, [ROWS_ZERO] * 40])
    queries, values = ([[KEPT] * 5 + [gone] * 11] * 4 for gone in (QUERY_GONE, ROWS_ZERO))
    whole = [[KEPT] * 16] * 4
    return prune_dimensions(model, [queries, whole], [values, whole])


def padded_batch(length=9):
    """Three sequences, one of them without tokens."""
    mask = torch.arange(length) < torch.tensor([[length], [0], [4]])
    return {"input_ids": torch.randint(0, 61, mask.shape), "attention_mask": mask.long()}


@pytest.mark.parametrize("dtype", TORCH.values())
@pytest.mark.parametrize("norm", ["layer_norm", "no_norm"])
def test_a_patched_model(norm, dtype):
    model, batch = pruned_model(norm), padded_batch()
    exact = packedbert.patch_model(copy.deepcopy(model).double(), backend="reference")
    own = packedbert.patch_model(copy.deepcopy(model).to(dtype), backend="reference")
    packedbert.patch_model(model.to(dtype), backend="triton")
    assert model.packedbert_report.backend == "triton"
    structure = model.packedbert_report.structure
    assert structure.norm == norm
    assert [(len(layer.heads), layer.ffn_width) for layer in structure.layers] == [(2, 20), (0, 0)]
    assert structure.layers[0].head_size == 8
    oracle, own, got = (m(**batch).last_hidden_state for m in (exact, own, model))
    assert_as_exact_as_torch(got, own, oracle)
    assert not got[batch["attention_mask"] == 0].any()


def test_a_compiled_model_has_no_graph_break():
    torch._dynamo.reset()
    model = packedbert.patch_model(pruned_model(), backend="triton")
    compiled = torch.compile(model, fullgraph=True)
    for length in (9, 13):
        batch = padded_batch(length)
        expected, got = (m(**batch).last_hidden_state for m in (model, compiled))
        torch.testing.assert_close(got, expected)


def test_a_new_length_starts_no_new_search(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_chosen", {})
    searches, tiles = [], triton_kernels.linear_tiles(float32=False)

    def bench(run, **_):
        searches.append(run)
        return float(len(searches))

    monkeypatch.setattr(triton_kernels.triton.testing, "do_bench", bench)
    for tokens in range(1, 5000, 7):
        for out_features, in_features in ((768, 768), (717, 768), (768, 552), (2304, 768)):
            key = triton_kernels.bucket(tokens, out_features, in_features)
            assert triton_kernels.choose_tile(key, lambda tile: None, tiles) == tiles[0]
    buckets = len(searches) // len(tiles)
    assert buckets <= 5  # of tokens; the seed's sizes share one


@pytest.mark.parametrize(
    "case",
    [linear("float32", (64, 64), 3, 8, 9), attention("float32", (3,), 1, 8), encoder("float32", 8, [(1, 8, 4)])],
    ids=lambda case: case.method,
)
def test_kernels_are_launched_on_the_device_of_their_tensors(case, monkeypatch):
    """Triton takes the current one."""
    devices, launches = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        devices.append(tensor.device)
        yield
        devices.pop()

    def launch(caged, grid):
        launches.append(devices[-1:])
        return stock(caged, grid)

    stock = Caged.__getitem__
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(Caged, "__getitem__", launch)
    case.check(case.as_op(triton_kernels))
    assert launches
    assert all(on == [torch.device("cpu")] for on in launches)


# ---------------------------------------------------------------------------------------------- the tester is tested


class Bug(NamedTuple):
    """What is broken in a copy of the kernels, in which case it shows, and how."""

    text: str
    broken: str
    case: Case
    words: str


ROWS = linear("float16", (64, 64), 33, 70, 64)
BUGS = {
    "a row more is stored": Bug(
        "there = (row[:, None] < used) & (column",
        "there = (row[:, None] <= used) & (column",
        ROWS,
        "y_ptr: written outside",
    ),
    "a column more is stored": Bug(
        "(row[:, None] < used) & (column[None, :] < N)\n",
        "(row[:, None] < used) & (column[None, :] <= N)\n",
        linear("float32", (64, 64), 1, 8, 63),
        "y_ptr: written outside",
    ),
    "an input more is multiplied": Bug(
        "mask=(row[:, None] < used) & (k[None, :] < K)", "mask=(row[:, None] < used) & (k[None, :] <= K)", ROWS, "nan"
    ),
    "a norm stores a column more": Bug(
        "    there = column < N\n", "    there = column <= N\n", rows("bfloat16", 5, 77), "y_ptr: written outside|nan"
    ),
    "a query more is stored": Bug(
        "of_queries = (query[:, None] < length)",
        "of_queries = (query[:, None] <= length)",
        attention("float32", (5, 3), 1, 32),
        "o_ptr: written outside",
    ),
    "a value more is read": Bug(
        "mask=(key[:, None] < length) & (d[None, :] < D)",
        "mask=(key[:, None] <= length) & (d[None, :] < D)",
        attention("float16", (5,), 1, 32),
        "nan",
    ),
    "keys beyond the end are attended to": Bug(
        "scores = tl.where(key[None, :] < length, scores",
        "scores = tl.where(key[None, :] <= length, scores",
        attention("float16", (5,), 1, 32),
        r"^\(0",
    ),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of NaN
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    bug = BUGS[name]
    broken = broken_kernels(bug.text, bug.broken, tmp_path)
    with pytest.raises(AssertionError, match=bug.words):
        bug.case.check(bug.case.as_op(broken))
