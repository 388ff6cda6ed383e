"""The CUDA kernels, compiled by g++ and run on the CPU: what they compute, where they read and write, and when.

Nothing here needs a GPU: test_gpu.py does. What it can't show: races between blocks, the order of memory operations,
speed.
"""

import re
import shutil
from typing import NamedTuple

import cuda_emulator
import numpy as np
import pytest
import torch
from cuda_cases import all_cases, encoder, linear, small_cases, small_encoders, to_numpy

pytestmark = pytest.mark.skipif(bool(cuda_emulator.why_not()), reason=cuda_emulator.why_not() or "-")

#: (build, seed of the scheduler, when copies land: see emulator.h).
WAYS = [
    ("plain", 0, 1),
    *[("races", seed, copies) for seed, copies in ((1, 1), (2, 0), (3, 2), (4, 1))],
    *[("address", seed, 1) for seed in (1, 2, 3, 4)],
]


def run_cases(cases, mode, **options):
    """Run them in one child process; fail with all that went wrong."""
    answers = cuda_emulator.run([(case.method, case.arguments) for case in cases], mode, **options)
    wrong = []
    launches = []
    for case, answer in zip(cases, answers, strict=True):
        try:
            assert not isinstance(answer, str), answer
            case.check(answer[0])
            launches += answer[1]
        except AssertionError as error:
            wrong.append(f"{case.name}: {str(error).splitlines()[0]}")
    assert not wrong, f"{len(wrong)} of {len(cases)} cases: " + "\n".join(wrong[:10])
    return launches


@pytest.mark.parametrize("mode", ["plain", "races", "address"])
def test_every_instantiation_with_every_epilogue(mode):
    launches = run_cases(all_cases(), mode, seed=5)
    assert sum(launch["matrix_loads"] for launch in launches) > 10_000
    assert sum(launch["bank_conflicts"] for launch in launches) == 0


@pytest.mark.parametrize(("mode", "seed", "copies_land"), WAYS)
def test_every_order_of_execution_gives_the_same(mode, seed, copies_land):
    run_cases(small_cases(), mode, seed=seed, copies_land=copies_land)


def test_every_kernel_in_the_sources_is_run():
    """No instantiation can be added to a launcher without a case that reaches it: those here are all there are."""
    answers = cuda_emulator.run([(case.method, case.arguments) for case in small_cases()], only_record=True)
    launched = {launch["kernel"] for answer in answers for launch in answer[1]}
    assert len([name for name in launched if "linear_kernel" in name]) == 12  # 2 dtypes, 3 tiles, sums or output
    assert len([name for name in launched if "row_kernel" in name]) == 9  # 3 dtypes, 3 sizes
    assert len([name for name in launched if "attention_kernel" in name]) == 9  # 3 dtypes, 3 sizes


@pytest.mark.parametrize("mode", ["plain", "races", "address"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_are_gathered_by_any_mask(mode, dtype):
    generator = torch.Generator().manual_seed(0)
    calls, expected = [], []
    for batch, length, size in ((1, 1, 8), (3, 40, 20), (2, 33, 9), (70, 3, 8), (4, 0, 8)):
        padded = torch.randn(batch, length, size, generator=generator).to(dtype)
        mask = torch.rand(batch, length, generator=generator) < 0.6
        mask[0] = False
        for m in (mask, torch.ones_like(mask), None):
            name = str(dtype).removeprefix("torch.")
            given = None if m is None else m.numpy()
            calls.append(("gather", {"dtype": name, "padded": to_numpy(padded), "mask": given}))
            expected.append((to_numpy(padded), (torch.ones_like(mask) if m is None else m).numpy()))
    for answer, (padded, mask) in zip(cuda_emulator.run(calls, mode, seed=1), expected, strict=True):
        assert not isinstance(answer, str), answer
        cu_seqlens, tokens, positions, output = answer[0]
        count = mask.sum()
        assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum().tolist()]
        assert positions[:count].tolist() == np.flatnonzero(mask).tolist()
        assert tokens[:count].tobytes() == padded[mask].tobytes()
        assert not output[~mask].any()


def test_the_plan_is_sound_for_every_shape():
    kernels = cuda_emulator.Kernels(only_record=True)
    for rows in (1, 16, 32, 128, 384, 1024, 16384):
        for out_features, in_features in ((768, 768), (768, 96), (2304, 768), (717, 768), (768, 717), (1, 1), (768, 0)):
            for multiprocessors, may_split in ((82, True), (108, True), (132, False)):
                tile_rows, columns, splits = kernels.plan(rows, out_features, in_features, multiprocessors, may_split)
                assert (tile_rows, columns) in ((128, 128), (64, 64), (32, 64))
                steps = -(-in_features // 32)
                assert splits == 1 or (may_split and -(-steps // splits) * (splits - 1) < steps)  # no part is empty
    # Few tokens: the tile whose slices share its steps, in parts if there are many. Many: the one with the fewest
    # bytes for each product.
    assert kernels.plan(32, 768, 768, 108, True) == (32, 64, 1)
    assert kernels.plan(32, 768, 3072, 108, True) == (32, 64, 4)
    assert kernels.plan(16384, 768, 768, 108, True) == (128, 128, 1)


@pytest.mark.parametrize(("mode", "seed", "copies_land"), WAYS)
@pytest.mark.parametrize("overlaps", [False, True])
def test_whole_encoders(mode, seed, copies_land, overlaps):
    """All launches in their order, each after the one before or, but for its first weights, as if beside it."""
    run_cases(small_encoders(), mode, seed=seed, copies_land=copies_land, overlaps=overlaps)


def test_a_layer_of_the_seed_and_its_launches():
    """Layer 10 of the seed: 768 wide, 5 heads of 64, 96 FFN rows."""
    mask = torch.arange(20) < torch.tensor([[20], [0], [7]])
    launches = run_cases([encoder("float16", 768, [(5, 64, 96)], mask, 20)], "plain")
    names = [re.search(r"cuda\d+([a-z_]+)_kernel", launch["kernel"])[1] for launch in launches]
    layer = ["linear", "half_attention", "linear", "row", "linear", "linear", "row"]
    assert names == ["prepack"] * 4 + ["count", "gather"] + layer


# ---------------------------------------------------------------------------------------------- the tester is tested


class Bug(NamedTuple):
    """What is broken in a copy of the sources, and what sees it."""

    file: str
    text: str
    broken: str
    mode: str
    words: str  # of the failure


STORED = "if (row >= rows) continue;"
BUGS = {
    "no barrier before a step's products": Bug(
        "packed_linear", "    __syncthreads();  // everyone's", "    // everyone's", "races", "race"
    ),
    "no wait for copies": Bug("packed_linear", "wait_for_copies<kStages - 2>();", "", "plain", "cases"),
    "one stage too few is waited for": Bug(
        "packed_linear", "wait_for_copies<kStages - 2>();", "wait_for_copies<kStages - 1>();", "plain", "cases"
    ),
    "shared memory a row short": Bug(
        "packed_linear", "kStages * kStageBytes;", "kStages * kStageBytes - 64;", "plain", "outside of shared|offset"
    ),
    "a chunk is copied beyond the end of a row": Bug(
        "packed_linear", "max(0, min(kChunkBytes, left))", "kChunkBytes", "address", "overflow|cases"
    ),
    "a row more is stored": Bug("packed_linear", STORED, "if (row > rows) continue;", "address", "overflow"),
    "weights are read as if they were not swizzled": Bug(
        "packed_linear", "tile_chunk(weight_row, half * 2 + lane / 8 % 2)", "half * 2 + lane / 8 % 2", "plain", "cases"
    ),
    "sums of slices take the place of steps too early": Bug(
        "packed_linear", "    __syncthreads();  // everyone is done with the stages", "", "races", "race"
    ),
    "sums of slices are read too early": Bug(
        "packed_linear", "    __syncthreads();  // and the sums are there", "", "races", "race"
    ),
    "no barrier before keys are replaced": Bug(
        "pruned_attention", "    __syncthreads();  // everyone is done with this stage", "", "races", "race"
    ),
    "float keys are replaced too early": Bug(
        "pruned_attention", "    __syncthreads();  // everyone is done with the keys", "    // keys", "races", "race"
    ),
    "keys beyond the end are attended to": Bug(
        "pruned_attention", "if (keys_left < kKeys) {", "if (false) {", "plain", "cases"
    ),
    "lanes leave before a shuffle": Bug(
        "row_epilogue",
        "  if (row >= rows) return;",
        "  if (row >= rows || lane * kEight >= a.size) return;",
        "plain",
        "deadlock|diverge",
    ),
    "the variance of what is beyond a row is counted": Bug(
        "row_epilogue", "column + i < a.size ? x[i] - mean : 0.0f", "x[i] - mean", "plain", "cases"
    ),
    "a barrier in a branch": Bug(
        "ragged_batch",
        "  __syncthreads();\n  if (warp > 0) return;",
        "  if (warp > 0) return;\n  __syncthreads();",
        "plain",
        "deadlock",
    ),
}
#: In kernels that may begin before the kernel before them is done.
WAIT = "  wait_for_kernel_before();\n"
FIRST_ROW, FIND_TILE = "  const int first_row = blockIdx.y", "  const QueryTile tile = find_tile<kQueries>"
OVERLAP_BUGS = {
    "inputs are read too early": Bug("packed_linear", WAIT + FIRST_ROW, FIRST_ROW, "races", "read before"),
    "a row is read too early": Bug("row_epilogue", WAIT, "", "races", "(read|write) before"),
    "queries are read too early": Bug("pruned_attention", WAIT + FIND_TILE, FIND_TILE, "races", "read before"),
    "a block without queries does not wait": Bug(
        "pruned_attention",
        WAIT + FIND_TILE,
        "  if (blockIdx.x > 1) return;\n" + WAIT + FIND_TILE,
        "plain",
        "without having waited",
    ),
}
METHODS = {"packed_linear": "linear", "row_epilogue": "rows", "pruned_attention": "attention"}


def plant(bug, folder):
    """The sources with the bug."""
    csrc = folder / "csrc"
    shutil.copytree(cuda_emulator.CSRC, csrc)
    file = csrc / "cuda" / f"{bug.file}.cu"
    source = file.read_text()
    assert source.count(bug.text) == 1, "the bug no longer fits the source: plant it anew"
    file.write_text(source.replace(bug.text, bug.broken))
    return csrc


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    bug = BUGS[name]
    csrc = plant(bug, tmp_path)
    if bug.file == "ragged_batch":
        call = ("gather", {"dtype": "float32", "padded": np.ones((3, 5, 8), np.float32), "mask": None})
        answers = cuda_emulator.run([call], bug.mode, csrc, seed=1)
        assert re.search(bug.words, str(answers[0])), answers
        return
    cases = [case for case in small_cases() if case.method == METHODS[bug.file]]
    cases.append(linear("float16", (32, 64), 33, 200, 64))
    with pytest.raises(AssertionError, match=bug.words):
        run_cases(cases, bug.mode, csrc=csrc, seed=1)


@pytest.mark.parametrize("name", OVERLAP_BUGS)
def test_a_kernel_that_begins_too_early_is_caught(name, tmp_path):
    bug = OVERLAP_BUGS[name]
    csrc = plant(bug, tmp_path)
    mask = torch.arange(7) < torch.tensor([[7], [0], [3]])
    for dtype in ("float16", "float32") if bug.file == "row_epilogue" else ("float16",):
        case = encoder(dtype, 64, [(1, 32, 9)], mask)
        run_cases([case], bug.mode, csrc=csrc, seed=1)
        with pytest.raises(AssertionError, match=bug.words):
            run_cases([case], bug.mode, csrc=csrc, seed=1, overlaps=True)
