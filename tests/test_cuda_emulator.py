"""The CUDA emulator runs right kernels right, and finds the bugs planted in wrong ones."""

import dataclasses
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.cuda_emulator import build, plugin
from tests.cuda_emulator.plugin import barrier_lines, configured, redundant_barriers

PLANTED = build.EMULATOR / "planted"
SEMANTICS = build.EMULATOR / "semantics"
ORDERS = ("ascending", "descending", "random", "sticky")
ASCENDING = {"order": "ascending", "seed": 1, "resident": 1, "preempt": 0}


def load_planted(*, check):
    return build.load(
        "planted", [PLANTED / "planted_cuda.cu", PLANTED / "planted.cpp"], check=check
    )


def load_semantics(*, check=False, **defines):
    sources = [SEMANTICS / "semantics_cuda.cu", SEMANTICS / "semantics.cpp"]
    return build.load("semantics", sources, check=check, defines=defines)


@pytest.fixture(scope="module", params=["fast", "check"])
def planted(request):
    return load_planted(check=request.param == "check")


@pytest.fixture(scope="module", params=["fast", "check", "portable switch", "no toolkit"])
def semantics(request):
    return {
        "fast": partial(load_semantics),
        "check": partial(load_semantics, check=True),
        "portable switch": partial(load_semantics, HESSREG_EMU_PORTABLE_SWITCH="1"),
        "no toolkit": partial(load_semantics, HESSREG_EMU_NO_TOOLKIT="1"),
    }[request.param]()


# ---- Sample kernels, with and without bugs


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected, tolerance=2e-5):
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"wrong result: relative error {error}"


def run_project(module, bug):
    g, v = normal(2, 3001)
    sums, out = np.zeros(2, np.float32), np.empty_like(g)
    module.project(g, v, sums, out, 5, bug)
    g, v = g.astype(float), v.astype(float)
    assert_close(out, g - g @ v / (v @ v) * v)


def run_ratio(module, bug):
    g, v = normal(2, 3001)
    ticket, out = np.zeros(1, np.uint32), np.empty(1, np.float32)
    module.ratio(g, v, ticket, out, 5, bug)
    g, v = g.astype(float), v.astype(float)
    assert_close(out, g @ v / (v @ v))


def run_gaussian_rows(module, bug, d=37):
    x, y, w = normal(70, d), normal(45, d), normal(45)
    out = np.empty(70, np.float32)
    module.gaussian_rows(x, y, w, out, 1 / d, bug)
    differences = x.astype(float)[:, None] - y
    assert_close(out, np.exp(-np.square(differences).sum(-1) / d) @ w)


def run_matrix_product(module, bug):
    a, b = normal(40, 68), normal(50, 68)
    c = np.empty((40, 50), np.float32)
    module.matrix_product(a, b, c, bug)
    assert_close(c, a.astype(float) @ b.T.astype(float), tolerance=2e-3)


def run_power_iteration(module, bug):
    a = normal(2, 33, 33)
    a += a.transpose(0, 2, 1).copy()
    a[:, 0, 0] += 40
    value, vector = np.empty(2, np.float32), np.empty((2, 33), np.float32)
    module.power_iteration(a, value, vector, 100, 1e-7, bug)
    assert_close(value, np.abs(np.linalg.eigvalsh(a.astype(float))).max(1), tolerance=1e-4)


def run_warp_scan(module, bug):
    x = normal(704)
    out = np.empty_like(x)
    module.warp_scan(x, out, bug)
    assert_close(out, x.reshape(-1, 32).cumsum(1, dtype=float).ravel())


def run_axpy(module, bug):
    g, v = normal(2, 1000)
    memory = np.full(1016, 7, np.float32)
    out, beyond = memory[:1000], memory[1000:]
    module.axpy(g, v, np.ones(1, np.float32), out, bug)
    assert_close(out, g - v.astype(float))
    assert (beyond == 7).all(), "wrong result: memory beyond the output has changed"


SAMPLES = {
    "project": run_project,
    "ratio": run_ratio,
    "gaussian_rows": run_gaussian_rows,
    "gaussian_rows by vectors": partial(run_gaussian_rows, d=40),
    "matrix_product": run_matrix_product,
    "power_iteration": run_power_iteration,
    "warp_scan": run_warp_scan,
    "axpy": run_axpy,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_clean_kernels_pass_in_every_order(planted, sample, order):
    for seed in (1, 2, 3):
        with configured(planted, order=order, seed=seed, resident=seed, preempt=50 * (seed - 1)):
            SAMPLES[sample](planted, planted.Bug.NONE)


@dataclasses.dataclass
class PlantedBug:
    """A bug, what the check build says of it, and who else notices.

    Attributes:
        name: Of the enumerator.
        run: Runs the kernel that has it.
        message: What the check build's error must match.
        file: The kernel file.
        line: Part of the line in this file that the message must name.
        ascending: Whether a run of the fast build in ascending order fails.
        sticky: Whether each of a few runs of the fast build in sticky order fails.
    """

    name: str
    run: Callable
    message: str
    file: str = ""
    line: str = ""
    ascending: bool = True
    sticky: bool = True


REDUCTIONS, ROWS, PRODUCT = "reductions.cuh", "gaussian_rows.cuh", "matrix_product.cuh"
POWER, ELEMENTWISE = "power_iteration.cuh", "elementwise.cuh"
READ_SLOT, USE_TILE = "? warp_sums[lane] :", "x_tile[first_row + r][k] -"
UNINITIALISED, WRONG = "uninitialised read of shared ", "wrong result: "

PLANTED_BUGS = [
    PlantedBug("SHUFFLE_STARTS_AT_EIGHT", run_ratio, WRONG),
    PlantedBug(
        "MASK_NAMES_HALF_THE_WARP",
        run_ratio,
        "(lane 0 shuffles from lane 16, which takes no part|a lane that its mask leaves out)",
        *(REDUCTIONS, "value += __shfl_xor_sync"),
    ),
    PlantedBug(
        "SCRATCH_REUSED_TOO_EARLY",
        run_ratio,
        r"race \(write after read\) on shared warp_sums.* of the same block",
        *(REDUCTIONS, "warp_sums[warp] = value"),
        ascending=False,
    ),
    PlantedBug(
        "SCRATCH_READ_TOO_EARLY", run_ratio, UNINITIALISED + "warp_sums", REDUCTIONS, READ_SLOT
    ),
    PlantedBug("ONE_SLOT_TOO_MANY", run_ratio, UNINITIALISED + "warp_sums", REDUCTIONS, READ_SLOT),
    PlantedBug(
        "PLAIN_ADD_ACROSS_BLOCKS",
        run_project,
        "race .* on sums.* of another block",
        *(REDUCTIONS, "*total += value"),
        ascending=False,
        sticky=False,
    ),
    PlantedBug(
        "NO_GRID_SYNC",
        run_project,
        "race .* on sums.* of another block",
        *(REDUCTIONS, "sums[0] / sums[1]"),
    ),
    PlantedBug(
        "NO_FENCE",
        run_ratio,
        r"race \(read after write\) on partials.* of another block",
        *(REDUCTIONS, "all.gv += partials[2 * block]"),
        ascending=False,
        sticky=False,
    ),
    PlantedBug(
        "FENCE_TOO_EARLY",
        run_ratio,
        r"race \(read after write\) on partials.* of another block",
        *(REDUCTIONS, "all.gv += partials[2 * block]"),
        ascending=False,
        sticky=False,
    ),
    PlantedBug(
        "SUM_OF_ANOTHER_WARP",
        run_ratio,
        r"race \(read after write\) on partials.*thread 32 of another block",
        *(REDUCTIONS, "all.vv += partials[2 * block + 1]"),
        ascending=False,
        sticky=False,
    ),
    PlantedBug(
        "TILE_REPLACED_TOO_EARLY",
        run_gaussian_rows,
        r"race .* on shared [xy]_tile.* of the same block",
        *(ROWS, "tile[row][column] = inside ? *element"),
    ),
    PlantedBug("TILE_USED_TOO_EARLY", run_gaussian_rows, UNINITIALISED + "x_tile", ROWS, USE_TILE),
    PlantedBug("ONE_COLUMN_TOO_MANY", run_gaussian_rows, UNINITIALISED + "x_tile", ROWS, USE_TILE),
    PlantedBug(
        "NO_TAIL_GUARD",
        run_gaussian_rows,
        r"out-of-bounds read of 4 bytes, \d+ bytes past the end of x",
        *(ROWS, "tile[row][column] = inside ? *element"),
        ascending=False,
        sticky=False,
    ),
    PlantedBug(
        "EARLY_RETURN",
        run_gaussian_rows,
        "thread returned while 64 thread.* wait in __syncthreads",
        *(ROWS, "kTileUsedTooEarly) __syncthreads()"),
    ),
    PlantedBug("TAIL_NOT_CLEARED", run_gaussian_rows, UNINITIALISED + "x_tile", ROWS, USE_TILE),
    PlantedBug(
        "WAITS_FOR_ONE_GROUP_LESS",
        run_matrix_product,
        UNINITIALISED + "dynamic",
        *(PRODUCT, "a_fragment[4] = {"),
    ),
    PlantedBug(
        "COPY_PAST_THE_END",
        run_matrix_product,
        r"out-of-bounds read of 16 bytes, \d+ bytes past the end of [ab]",
        *(PRODUCT, "cp_async16(target, source)"),
        ascending=False,
        sticky=False,
    ),
    PlantedBug("FRAGMENT_SWAPPED", run_matrix_product, WRONG),
    PlantedBug(
        "STAGE_REPLACED_TOO_EARLY",
        run_matrix_product,
        "race .* on shared dynamic.* of the same block",
        *(PRODUCT, "a_fragment[4] = {"),
    ),
    PlantedBug(
        "THREADS_LEAVE_ALONE",
        run_power_iteration,
        "__syncthreads after 1 thread.* of the block already returned",
        *(POWER, "kFlagReadWithoutBarrier) __syncthreads()"),
    ),
    PlantedBug(
        "FLAG_READ_WITHOUT_BARRIER",
        run_power_iteration,
        r"race \(read after write\) on shared converged",
        *(POWER, "if (converged[0]) break"),
        ascending=False,
    ),
    PlantedBug(
        "NO_WARP_BARRIER",
        run_warp_scan,
        r"race \(read after write\) on shared sums",
        *(ELEMENTWISE, "? sums[t - distance]"),
    ),
    PlantedBug(
        "VOTE_AS_BARRIER",
        run_warp_scan,
        r"race .* on shared sums",
        *(ELEMENTWISE, "sums[t] += left"),
        ascending=False,
        sticky=False,
    ),
    PlantedBug(
        "ONE_ELEMENT_TOO_MANY",
        run_axpy,
        "out-of-bounds write of 4 bytes, 4 bytes past the end of out",
        *(ELEMENTWISE, "out[i] = 0"),
    ),
]

# The fast build's access would kill the process.
MISALIGNED_VECTOR = PlantedBug(
    "MISALIGNED_VECTOR",
    partial(run_gaussian_rows, d=40),
    "misaligned access",
    *(ROWS, "reinterpret_cast<const float4*>(element)"),
)

by_name = pytest.mark.parametrize("bug", PLANTED_BUGS, ids=lambda bug: bug.name)


def failure_of(module, bug):
    """What a run says, or nothing if it is right."""
    try:
        bug.run(module, getattr(module.Bug, bug.name))
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return ""


def place(source, text):
    """Where a text stands in a file, as messages have it."""
    lines = source.read_text().splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if text in line)
    return f"{source.name}:{number}"


@pytest.mark.parametrize("bug", [*PLANTED_BUGS, MISALIGNED_VECTOR], ids=lambda bug: bug.name)
def test_check_build_finds_every_planted_bug(bug):
    module = load_planted(check=True)
    with configured(module, **ASCENDING):
        message = failure_of(module, bug)
    assert re.search(bug.message, message)
    if bug.file:
        assert place(PLANTED / bug.file, bug.line) in message
        assert re.search(r"by block \(\d,0,0\) thread \(\d+,0,0\)", message)


@pytest.mark.parametrize("order", ORDERS)
def test_checker_finds_bugs_whatever_the_order(order):
    module = load_planted(check=True)
    with configured(module, order=order, seed=5, resident=3):
        missed = [bug.name for bug in PLANTED_BUGS if not failure_of(module, bug)]
    assert missed == []


@by_name
def test_fast_build_in_ascending_order(bug):
    module = load_planted(check=False)
    with configured(module, **ASCENDING):
        assert bool(failure_of(module, bug)) == bug.ascending


@by_name
def test_fast_build_in_sticky_order(bug):
    module = load_planted(check=False)
    for seed in (1, 2, 3):
        with configured(module, order="sticky", seed=seed, resident=seed, preempt=0):
            assert bool(failure_of(module, bug)) == bug.sticky


def test_barrier_audit_finds_the_redundant_barrier():
    module = load_planted(check=True)
    redundant = {}
    for file, runs in {
        REDUCTIONS: (run_project, run_ratio),
        ROWS: (run_gaussian_rows,),
        PRODUCT: (run_matrix_product,),
        POWER: (run_power_iteration,),
        ELEMENTWISE: (run_warp_scan,),
    }.items():

        def run_all(runs=runs):
            for run in runs:
                run(module, module.Bug.NONE)

        redundant[file] = redundant_barriers(module, PLANTED / file, run_all)
    (line,) = (
        number
        for number, text in enumerate((PLANTED / POWER).read_text().splitlines(), 1)
        if "// redundant" in text
    )
    assert redundant == {REDUCTIONS: [], ROWS: [], PRODUCT: [], POWER: [line], ELEMENTWISE: []}


def test_barrier_audit_refuses_a_barrier_that_is_never_reached():
    module = load_planted(check=True)
    assert barrier_lines(PLANTED / ELEMENTWISE)
    with pytest.raises(ValueError, match="never reached"):
        redundant_barriers(module, PLANTED / ELEMENTWISE, lambda: None)


def profile(module, run, where, access):
    """The entry of one line for a run."""
    with configured(module, profile=True, **ASCENDING):
        run()
    entries = module.emulator.take_profile()
    (entry,) = (e for e in entries if (e["where"], e["access"]) == (where, access))
    return entry


def test_profile_shows_bank_conflicts():
    module = load_planted(check=True)
    where = place(PLANTED / ROWS, USE_TILE)
    padded, unpadded = (
        profile(module, partial(run_gaussian_rows, module, bug), where, "load")
        for bug in (module.Bug.NONE, module.Bug.UNPADDED_TILE)
    )
    assert padded["space"] == "shared"
    assert padded["transactions"] == padded["fewest_possible"] == padded["requests"]
    # One load in two is of x_tile, where all lanes ask for the same word.
    assert unpadded["transactions"] == unpadded["requests"] / 2 * (1 + 32)


@pytest.mark.parametrize(("stride", "wavefronts"), [(0, 4), (1, 4), (2, 8)])
def test_profile_of_vector_loads(stride, wavefronts):
    module = load_semantics(check=True)
    where = place(SEMANTICS / "semantics_cuda.cu", "value = values[t * stride]")
    run = partial(module.load_vectors, np.empty(32, np.float32), stride)
    entry = profile(module, run, where, "load")
    assert (entry["requests"], entry["bytes"]) == (1, 16)
    assert (entry["transactions"], entry["fewest_possible"]) == (wavefronts, 4)


def test_profile_counts_sectors():
    module = load_planted(check=True)
    where = place(PLANTED / ELEMENTWISE, "= g[i] - c[0]")
    entry = profile(module, partial(run_axpy, module, module.Bug.NONE), where, "store")
    assert (entry["space"], entry["bytes"], entry["requests"]) == ("global", 4, 32)
    assert entry["fewest_possible"] == 125  # of 32 bytes, for 1000 elements
    assert 125 <= entry["transactions"] <= 125 + 32  # the array may start within a sector


# ---- Semantics of instructions


def test_shuffles(semantics):
    out = np.empty((32, 8), np.int32)
    semantics.shuffles(out)
    lane = np.arange(32)
    segment = lane // 8 * 8
    expected = [
        np.full(32, 5),
        segment + 3,
        np.full(32, 37 % 32),
        np.where(lane % 16 < 3, lane, lane - 3),
        np.where(lane % 16 + 3 > 15, lane, lane + 3),
        np.where((lane ^ 9) >= segment + 8, lane, lane ^ 9),
        lane ^ 31,
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
    ]
    np.testing.assert_array_equal(out, np.stack(expected, 1))


def test_shuffle_of_doubles(semantics):
    x, out = np.random.default_rng(0).standard_normal(32), np.empty(32)
    semantics.wide_shuffle(x, out)
    np.testing.assert_array_equal(out, x[np.arange(32) ^ 1])


def test_collectives_of_partial_warps(semantics):
    out = np.empty((3, 40), np.int32)
    semantics.partial_warps(out)
    reduced = [3] * 4 + [28] * 28 + [35] * 4 + [4] * 4
    np.testing.assert_array_equal(out, [reduced, [1] * 40, [0] * 32 + [1] * 8])


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_that_returned_take_no_part(semantics, order):
    out = np.empty(16, np.int32)
    with configured(semantics, order=order):
        semantics.votes_of_rest(out)
    np.testing.assert_array_equal(out, [16] * 16)


def test_votes_of_a_block(semantics):
    out = np.empty((3, 64), np.int32)
    semantics.votes_of_block(out)
    np.testing.assert_array_equal(out, np.repeat([[16], [0], [1]], 64, 1))


def test_reductions_of_a_warp(semantics):
    x = np.random.default_rng(0).integers(-1000, 1000, 32).astype(np.int32)
    out = np.empty(6, np.int32)
    semantics.reductions(x, out)
    operations = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
    expected = [x.sum(), x.min(), x.max(), *(operation.reduce(x) for operation in operations)]
    np.testing.assert_array_equal(out, expected)


def test_atomics(semantics):
    out = np.zeros(6, np.int32)
    semantics.atomics(out)
    np.testing.assert_array_equal(out, [496, -31, 31, 7, 9, 32 % 5])


def round_mantissa(x, bits):
    """x with its mantissa rounded to so many bits, ties away from zero."""
    unit = 2.0 ** (np.floor(np.log2(np.abs(x))) - bits)
    return np.sign(x) * np.floor(np.abs(x) / unit + 0.5) * unit


def test_rounding_to_tf32(semantics):
    ties = np.array([0x3F801000, 0xBF801000, 0x3F800FFF, 0x3F803000], np.uint32).view(np.float32)
    x = np.concatenate([normal(1000), ties])
    out = np.empty_like(x)
    semantics.round_to_tf32(x, out)
    np.testing.assert_array_equal(out, round_mantissa(x.astype(float), 10))


def test_tf32_rounding_keeps_infinity_and_nan(semantics):
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    out = np.empty_like(x)
    semantics.round_to_tf32(x, out)
    np.testing.assert_array_equal(out, x)


def test_power_of_two_flushes_subnormals(semantics):
    x = np.array([-130, -126, 0, 1, 0.5, -np.inf, np.inf], np.float32)
    out = np.empty_like(x)
    semantics.power_of_two(x, out)
    np.testing.assert_allclose(out, [0, 2.0**-126, 1, 2, 2**0.5, 0, np.inf], rtol=2e-7)


@pytest.mark.parametrize("rounded", [True, False])
def test_mma_of_tf32(semantics, rounded):
    a, b, c = normal(16, 8), normal(8, 8), np.empty((16, 8), np.float32)
    semantics.mma_tf32(a, b, c, rounded)
    if rounded:
        a, b = (round_mantissa(x.astype(float), 10) for x in (a, b))
    else:  # the tensor cores ignore the lower bits
        a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(float) for x in (a, b))
    np.testing.assert_allclose(c, a @ b.T + 1, rtol=1e-6, atol=1e-6)


def test_mma_of_bfloat16(semantics):
    a, b = (normal(rows, 16).view(np.uint32) >> 16 for rows in (16, 8))
    c = np.empty((16, 8), np.float32)
    semantics.mma_bf16(a.astype(np.uint16), b.astype(np.uint16), c)
    a, b = ((x << 16).view(np.float32).astype(float) for x in (a, b))
    np.testing.assert_allclose(c, a @ b.T + 1, rtol=1e-6, atol=1e-6)


ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def test_half_to_float(semantics):
    out = np.empty(1 << 16, np.float32)
    semantics.half_to_float(ALL_16_BITS, out)
    np.testing.assert_array_equal(out, ALL_16_BITS.view(np.float16).astype(np.float32))


def test_float_to_half(semantics):
    halves = ALL_16_BITS.view(np.float16)[np.isfinite(ALL_16_BITS.view(np.float16))]
    exact = np.sort(halves.astype(np.float32))
    x = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2, normal(1000)])
    x = np.concatenate([x, np.array([65519, 65520, 1e30, np.inf, -np.inf, 1e-9], np.float32)])
    out = np.empty(x.size, np.uint16)
    semantics.float_to_half(x, out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, x.astype(np.float16).view(np.uint16))


def test_bfloat16_to_float(semantics):
    out = np.empty(1 << 16, np.float32)
    semantics.bfloat16_to_float(ALL_16_BITS, out)
    np.testing.assert_array_equal(out, (ALL_16_BITS.astype(np.uint32) << 16).view(np.float32))


def test_float_to_bfloat16(semantics):
    bits = np.random.default_rng(0).integers(0, 0x7F800000, 10000).astype(np.uint32)
    ties = bits & 0xFFFF0000 | 0x8000
    bits = np.concatenate([bits, ties, bits | 0x80000000])
    out = np.empty(bits.size, np.uint16)
    semantics.float_to_bfloat16(bits.view(np.float32), out)
    high, low = bits >> 16, bits & 0xFFFF
    np.testing.assert_array_equal(out, high + ((low + (high & 1)) > 0x8000))


def test_nan_stays_nan(semantics):
    x, out = np.full(1, np.nan, np.float32), np.empty(1, np.uint16)
    semantics.float_to_half(x, out)
    assert np.isnan(out.view(np.float16))
    semantics.float_to_bfloat16(x, out)
    assert np.isnan((out.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("order", ORDERS)
def test_copies_of_single_elements(semantics, order):
    x = normal(4, 8)
    with configured(semantics, order=order):
        for transpose, y in (semantics.transpose, x), (semantics.transpose_wide, x.astype(float)):
            out = np.empty((8, 4), y.dtype)
            transpose(y, out)
            np.testing.assert_array_equal(out, y.T)


def test_shared_memory_of_a_smaller_device(semantics):
    assert semantics.most_shared_memory() == 227 << 10
    with configured(semantics, shared=163 << 10):
        assert semantics.most_shared_memory() == 163 << 10
        semantics.launch(1, 32, 163 << 10, False)
        with pytest.raises(RuntimeError, match="too much dynamic shared memory"):
            semantics.launch(1, 32, (163 << 10) + 1, False)


@pytest.mark.parametrize("order", ["ascending", "sticky"])
def test_shared_memory_starts_as_nan(order):
    module, out = load_semantics(), np.empty(2, np.float32)
    with configured(module, order=order):
        module.initial_shared_memory(out)
    assert np.isnan(out).all()


def test_grid_constant_parameters_are_not_copied(semantics):
    out = np.empty(64, np.uint64)
    semantics.parameter_addresses(out)
    assert len(set(out)) == 1


# ---- Orders


def thread_order(module, blocks=3, threads=64, **options):
    out = np.empty(blocks * threads, np.int32)
    with configured(module, **{**ASCENDING, **options}):
        module.thread_order(np.zeros(1, np.int32), out, blocks, threads)
    assert sorted(out) == list(range(out.size))
    return out.tolist()


def test_ascending_and_descending_order(semantics):
    assert thread_order(semantics) == list(range(192))
    assert thread_order(semantics, order="descending") == list(range(192))[::-1]


@pytest.mark.parametrize("order", ["random", "sticky"])
def test_random_orders_follow_their_seed(semantics, order):
    first, again, other = (thread_order(semantics, order=order, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first != list(range(192))


def test_sticky_order_keeps_to_a_warp(semantics):
    warps = np.array(thread_order(semantics, order="sticky", resident=3)) // 32
    assert (np.diff(warps) != 0).sum() == 5


def test_resident_blocks_interleave(semantics):
    blocks = np.array(thread_order(semantics, order="random", resident=3)) // 64
    assert (np.diff(blocks) != 0).sum() > 20
    blocks = np.array(thread_order(semantics, order="random", resident=1)) // 64
    assert (np.diff(blocks) != 0).sum() == 2


def test_preemption_switches_between_accesses():
    module = load_semantics(check=True)
    switches = []
    for preempt in (0, 2):
        before = module.emulator.statistics()["switches"]
        thread_order(module, preempt=preempt)
        switches.append(module.emulator.statistics()["switches"] - before)
    assert switches[1] > 1.2 * switches[0]


# ---- Errors


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("diverge_at_barriers", r"divergent __syncthreads: 1 thread.* wait at semantics_cuda\.cu:"),
        ("deadlock", r"deadlock(.|\n)*16 thread.* wait in __syncthreads at semantics_cuda\.cu"),
        ("call_outside_mask", r"a lane that its mask leaves out at .*thread \(16,0,0\)"),
        ("use_too_much_shared_memory", r"over 48 KiB with large at semantics_cuda\.cu"),
        ("use_dynamic_shared_memory_of_none", r"the launch gave none, at semantics_cuda\.cu"),
        ("sync_grid_without_cooperative_launch", r"not cooperative at semantics_cuda\.cu"),
    ],
)
def test_errors_name_their_place(semantics, function, message):
    with configured(semantics, **ASCENDING), pytest.raises(RuntimeError, match=message):
        getattr(semantics, function)()
    semantics.launch(1, 1, 0, False)  # and leave the emulator in order


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ((1, 1025, 0, False), "invalid block size"),
        ((1, 0, 0, False), "invalid block size"),
        ((0, 32, 0, False), "invalid grid size"),
        ((1, 32, 228 << 10, False), "too much dynamic shared memory"),
        ((9000, 1024, 0, True), "too many blocks for a cooperative launch"),
    ],
)
def test_launches_that_cuda_would_refuse(semantics, launch, message):
    with pytest.raises(RuntimeError, match=f"CUDA launch of empty_kernel failed: {message}"):
        semantics.launch(*launch)


def test_checker_finds_an_index_out_of_bounds():
    module = load_semantics(check=True)
    with pytest.raises(RuntimeError, match=r"array index 6 out of bounds at semantics_cuda\.cu:"):
        module.write_local(np.zeros(1, np.int32), 6)


def test_checker_finds_undefined_integer_arithmetic():
    module, x = load_semantics(check=True), np.empty(2, np.int32)
    module.calculate_with_integers(x, 5)
    assert x.tolist() == [6, 32]
    with pytest.raises(RuntimeError) as error:
        module.calculate_with_integers(x, 2**31 - 1)
    source = SEMANTICS / "semantics_cuda.cu"
    overflow, shift = place(source, "x[0] = value + 1"), place(source, "x[1] = 1 << value")
    assert f"signed integer overflow in an addition at {overflow} by block" in str(error.value)
    assert f"shift out of range at {shift} by block" in str(error.value)


@pytest.mark.parametrize("write_last", [False, True])
def test_checker_tells_the_halves_of_a_word_apart(write_last):
    module = load_semantics(check=True)
    kind = "write after read" if write_last else "read after write"
    message = rf"race \({kind}\) on x\+0 .* thread \(32,0,0\), not ordered with thread 0 of"
    with configured(module, **ASCENDING), pytest.raises(RuntimeError, match=message):
        module.race_on_half_word(np.zeros(4, np.uint16), write_last)


def test_checker_remembers_readers_of_another_warp():
    module = load_semantics(check=True)
    message = r"race \(write after read\) on x\+0 .* thread \(32,0,0\), not ordered with thread 31"
    with configured(module, **ASCENDING), pytest.raises(RuntimeError, match=message):
        module.race_with_first_warp(np.zeros(1, np.int32))


def test_checker_finds_what_lies_between_shared_arrays():
    module, out = load_semantics(check=True), np.empty(1, np.float32)
    module.write_shared(out, 15)
    with pytest.raises(RuntimeError, match="out-of-bounds write of 4 bytes, in no shared array"):
        module.write_shared(out, 16)


def test_constants_may_be_read(semantics):
    out = np.empty(1, np.float32)
    semantics.read_constant(out, 3)
    assert out == 9


def test_checker_knows_the_arguments_of_a_launch():
    module = load_semantics(check=True)
    with pytest.raises(RuntimeError, match="far from every registered argument"):
        module.read_unregistered(np.zeros(1 << 20, np.float32), np.empty(1, np.float32))


def test_numpy_arguments_are_validated():
    module = load_semantics()
    out = np.empty(4, np.float32)
    with pytest.raises(TypeError, match="x: expected dtype float32, got float64"):
        module.power_of_two(np.zeros(4), out)
    with pytest.raises(ValueError, match="x: expected a C-contiguous array"):
        module.power_of_two(np.zeros(8, np.float32)[::2], out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        module.power_of_two(np.zeros(4, np.float32), out)


def test_output_starts_as_nan():
    out = np.zeros(8, np.float32)
    load_semantics().power_of_two(np.ones(4, np.float32), out)
    np.testing.assert_array_equal(out, [2] * 4 + [np.nan] * 4)


def test_configuration_is_validated():
    module = load_semantics()
    with pytest.raises(TypeError, match="no such option of the emulator: oder"):
        module.emulator.configure(oder="random")
    with pytest.raises(ValueError, match=r"order must be ascending, .* got 'upwards'"):
        module.emulator.configure(order="upwards")


# ---- Building and options


def test_options_of_pytest_reach_the_environment(monkeypatch):
    options = {"--emu-order": "sticky", "--emu-seed": 7}
    for name in ("HESSREG_EMU_ORDER", "HESSREG_EMU_SEED"):
        monkeypatch.setenv(name, "")
    plugin.pytest_configure(types.SimpleNamespace(getoption=options.get))
    assert os.environ["HESSREG_EMU_ORDER"] == "sticky"
    assert os.environ["HESSREG_EMU_SEED"] == "7"


def test_configuration_comes_from_the_environment():
    script = (
        "from tests.test_cuda_emulator import load_semantics\n"
        "print(load_semantics().emulator.configuration())"
    )
    options = {"ORDER": "sticky", "SEED": "7", "RESIDENT": "2", "PREEMPT": "9", "PROFILE": "1"}
    options |= {"SKIP_FILE": "kernel.cuh", "SKIP_LINE": "12"}
    environment = {f"HESSREG_EMU_{name}": value for name, value in options.items()}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=build.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = "'sticky', 'seed': 7, 'resident': 2, 'preempt': 9, 'profile': True, "
    assert expected + "'skip_file': 'kernel.cuh', 'skip_line': 12" in result.stdout


def test_nothing_is_built_twice(monkeypatch):
    load_semantics()
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"built again: {command}"))
    build._load.cache_clear()
    load_semantics()


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.compiler.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs g\+\+ .* found no 'no-such-compiler'"):
        build.compiler()
    monkeypatch.undo()
    build.compiler.cache_clear()


def test_compiler_errors_are_shown(tmp_path: Path):
    source = tmp_path / "raw_cuda.cu"
    source.write_text(
        '#include "common/cuda_compat.cuh"\n__global__ void k() { __shared__ int x[4]; }\n'
    )
    with pytest.raises(RuntimeError, match="use_HESSREG_SHARED_instead_of_raw___shared__"):
        build.load("raw", [source])
