"""The interpreter of PTX against numpy, and against mistakes that it must find."""

import math
import os
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_emulator import ptx

CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
needs_nvcc = pytest.mark.skipif(
    not (CUDA_HOME / "bin/nvcc").exists() or not (CUDA_HOME / "include/cuda_runtime.h").exists(),
    reason=f"needs a CUDA toolkit, looked for bin/nvcc and include/cuda_runtime.h in {CUDA_HOME}",
)

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#define KERNEL extern "C" __global__ void
#define I (blockIdx.x * blockDim.x + threadIdx.x)
__device__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

KERNEL integers(const int* a, const int* b, int* out) {
  int x = a[I], y = b[I]; int* o = out + I * 16; unsigned u = x, v = y;
  o[0] = x / y; o[1] = x % y; o[2] = u / v; o[3] = u % v;
  o[4] = x * y; o[5] = __mulhi(x, y); o[6] = __umulhi(u, v); o[7] = x >> (v & 31);
  o[8] = u >> (v & 31); o[9] = x << (v & 31); o[10] = __funnelshift_l(u, v, 5); o[11] = __funnelshift_rc(u, v, 40);
  o[12] = __popc(u) + 100 * __clz(x) + 10000 * __ffs(x); o[13] = __brev(u); o[14] = __byte_perm(u, v, 0x3614);
  o[15] = (u ^ v) & ~(u | 0xf0f0u) | (v & 0x1234u);
}

KERNEL bits(const int* a, const unsigned* place, int* out) {
  int x = a[I], r; unsigned p = place[I] & 255, n = place[I] >> 8 & 255; int* o = out + I * 4;
  asm("bfe.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(p), "r"(n)); o[0] = r;
  asm("bfe.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(p), "r"(n)); o[1] = r;
  asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(x), "r"(0x5a5a5a5a), "r"(p), "r"(n)); o[2] = r;
  o[3] = (signed char)x + (short)x + (unsigned char)(x >> 8);
}

KERNEL long_integers(const long long* a, const long long* b, long long* out) {
  long long x = a[I], y = b[I]; long long* o = out + I * 6;
  o[0] = x / y; o[1] = x % y; o[2] = x * y; o[3] = __mul64hi(x, y); o[4] = __popcll(x) + 100 * __clzll(x);
  o[5] = (long long)(int)x * (int)y + y;
}

KERNEL halves(const float* in, __half* h, __nv_bfloat16* b, unsigned* pairs, float* back) {
  float x = in[I], y = in[I ^ 1];
  h[I] = __float2half_rn(x); b[I] = __float2bfloat16_rn(x); back[2 * I] = __half2float(h[I]);
  back[2 * I + 1] = __bfloat162float(b[I]); unsigned p, q;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(p) : "f"(x), "f"(y));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(q) : "f"(x), "f"(y));
  pairs[2 * I] = p; pairs[2 * I + 1] = q;
}

KERNEL half_arithmetic(const __half2* a, const __nv_bfloat162* b, __half2* o, __nv_bfloat162* p) {
  __half2 x = a[3 * I], y = a[3 * I + 1], z = a[3 * I + 2];
  o[5 * I] = __hadd2(x, y); o[5 * I + 1] = __hmul2(x, y); o[5 * I + 2] = __hfma2(x, y, z);
  o[5 * I + 3] = __hmax2(x, y); o[5 * I + 4] = __hneg2(x);
  __nv_bfloat162 u = b[3 * I], v = b[3 * I + 1], w = b[3 * I + 2];
  p[5 * I] = __hadd2(u, v); p[5 * I + 1] = __hmul2(u, v); p[5 * I + 2] = __hfma2(u, v, w);
  p[5 * I + 3] = __hmax2(u, v); p[5 * I + 4] = __hneg2(u);
}

KERNEL to_integers(const float* in, int* out) {
  float x = in[I]; int* o = out + 5 * I;
  o[0] = __float2int_rn(x); o[1] = __float2int_rz(x); o[2] = __float2int_rd(x); o[3] = __float2int_ru(x);
  o[4] = __float2uint_rz(x);
}

KERNEL functions(const float* in, float* out) {
  float x = in[I]; float* o = out + 12 * I;
  o[0] = erff(x); o[1] = normcdff(x); o[2] = tanhf(x); o[3] = __expf(x); o[4] = expf(x); o[5] = sinf(x);
  o[6] = logf(fabsf(x) + 1e-3f); o[7] = rsqrtf(x * x + 1.f); o[8] = x / 3.f; o[9] = sqrtf(fabsf(x)); o[10] = roundf(x);
  o[11] = (float)exp((double)x);
}

KERNEL compares(const float* a, const float* b, int* out) {
  float x = a[I], y = b[I];
  out[I] = (x < y) | (x <= y) << 1 | (x == y) << 2 | (x != y) << 3 | !(x < y) << 4 | !(x >= y) << 5
    | (x > y && y > 0.f) << 6 | (x > y || y < 0.f) << 7 | (fmaxf(x, y) == y) << 8;
}

KERNEL divergent(const int* trips, int* out) {
  int sum = 0;
  for (int i = 0; i < trips[I]; i++) { if (i % 3 == 1) continue; sum += i * (int)threadIdx.x; if (sum > 400) break; }
  out[I] = sum;
}

KERNEL warp_functions(const float* in, float* sums, int* places, float* moved) {
  float x = in[I], s = x;
  for (int d = 16; d; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
  sums[I] = s;
  unsigned ballot = __ballot_sync(~0u, x > 0.f), before = ballot & ((1u << (threadIdx.x & 31)) - 1);
  places[I] = __popc(before) + 100 * __any_sync(~0u, x > 1e9f) + 1000 * __all_sync(~0u, x < 1e9f);
  moved[4 * I] = __shfl_up_sync(~0u, x, 3); moved[4 * I + 1] = __shfl_down_sync(~0u, x, 5);
  moved[4 * I + 2] = __shfl_sync(~0u, x, 7, 16); moved[4 * I + 3] = __shfl_down_sync(~0u, x, 2, 8);
}

KERNEL tree(const float* in, float* out, int* counter) {
  __shared__ float partial[128];
  extern __shared__ float dynamic[];
  partial[threadIdx.x] = dynamic[threadIdx.x] = in[I];
  for (int half = 64; half; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  __syncthreads();
  out[I] = partial[0] + dynamic[127 - threadIdx.x];
  if (threadIdx.x % 32 == 0) atomicAdd(counter, 1);
  atomicMax(counter + 1, (int)I);
}

// One tile: A [16, 16], B as [k, n] (plain == false) or [n, k]; D [16, 8] = A B + C
template <bool bf16> __device__ void tile(const uint4* a, const uint4* b, const float* c, float* d, bool trans) {
  __shared__ __align__(16) uint4 sa[32], sb[16];
  int lane = threadIdx.x; sa[lane] = a[lane]; if (lane < 16) sb[lane] = b[lane];
  __syncwarp(); unsigned A[4], B[2]; float D[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
    : "=r"(A[0]), "=r"(A[1]), "=r"(A[2]), "=r"(A[3]) : "r"(shared_address(sa + lane % 16 * 2 + lane / 16)));
  if (trans) asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
    : "=r"(B[0]), "=r"(B[1]) : "r"(shared_address(sb + lane % 16)));                                // rows are k
  else asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
    : "=r"(B[0]), "=r"(B[1]) : "r"(shared_address(sb + lane % 8 * 2 + lane / 8 % 2)));               // rows are n
  for (int i = 0; i < 4; i++) D[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
#define MMA(T) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." T "." T ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, " \
    "{%8,%9}, {%0,%1,%2,%3};" : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3]) \
    : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]))
  if (bf16) MMA("bf16"); else MMA("f16");
  for (int i = 0; i < 4; i++) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = D[i];
}
KERNEL tile_f16(const uint4* a, const uint4* b, const float* c, float* d, int trans) { tile<false>(a, b, c, d, trans); }
KERNEL tile_bf16(const uint4* a, const uint4* b, const float* c, float* d, int trans) { tile<true>(a, b, c, d, trans); }

KERNEL tile_int8(const uint4* a, const uint2* b, const int* c, int* d) {  // A [16, 32], B [8 columns, 32]
  const unsigned* pa = (const unsigned*)a; const unsigned* pb = (const unsigned*)b;
  int g = threadIdx.x / 4, t = threadIdx.x % 4, D[4];
  for (int i = 0; i < 4; i++) D[i] = c[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+r"(D[0]), "+r"(D[1]), "+r"(D[2]), "+r"(D[3])
    : "r"(pa[g * 8 + t]), "r"(pa[(g + 8) * 8 + t]), "r"(pa[g * 8 + t + 4]), "r"(pa[(g + 8) * 8 + t + 4]),
      "r"(pb[g * 8 + t]), "r"(pb[g * 8 + t + 4]));
  for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = D[i];
}

// mode 0: wait for all; 1: no wait; 2: wait for all but the last group, which is the odd lanes' copies
KERNEL async_copy(const float4* in, const int* bytes, float4* out, int mode) {
  extern __shared__ float4 stage[];
  auto copy = [&](bool mine) { if (mine) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
    :: "r"(shared_address(stage + threadIdx.x)), "l"(in + threadIdx.x), "r"(bytes[threadIdx.x]) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory"); };
  copy(threadIdx.x % 2 == 0); copy(threadIdx.x % 2);
  if (mode == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (mode == 2) asm volatile("cp.async.wait_group 1;" ::: "memory");
  out[threadIdx.x] = stage[threadIdx.x];
}

struct Task { const float* in; float* out; int count; float scale; unsigned short mask; };
KERNEL by_value(Task task, int offset) {
  if (I < task.count) task.out[I] = task.in[I] * task.scale + offset + task.mask;
}

KERNEL local_array(const int* order, int* out) {
  int values[8];
  for (int i = 0; i < 8; i++) values[order[i]] = 10 * i + threadIdx.x;
  out[I] = values[threadIdx.x % 8];
}

KERNEL shared_access(float* out, int index) {
  extern __shared__ float s[]; s[index] = 1.f; out[threadIdx.x] = s[index];
}
KERNEL misaligned(const char* in, int* out, int offset) {
  out[threadIdx.x] = *(const int*)(in + 4 * threadIdx.x + offset);
}
KERNEL divergent_barrier(int* out, int threads) {
  if (threadIdx.x < threads) __syncthreads();
  out[threadIdx.x] = 1;
}
KERNEL partial_shuffle(int* out, unsigned mask) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(mask, (int)threadIdx.x, 1);
}
KERNEL stops(int* out) { if (out[0]) __trap(); }

// A GEMM's inner loop, to time the interpreter
KERNEL inner_loop(const float4* in, float* out, int steps) {
  extern __shared__ float4 stage[];
  float D[8][4] = {};
  for (int k = 0; k < steps; k++) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
      :: "r"(shared_address(stage + threadIdx.x)), "l"(in + threadIdx.x) : "memory");
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    unsigned A[4], B[4];
    for (unsigned* r : {A, B}) asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(stage + threadIdx.x % 32)));
#pragma unroll
    for (int j = 0; j < 8; j++)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};" : "+f"(D[j][0]), "+f"(D[j][1]), "+f"(D[j][2]), "+f"(D[j][3])
        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[j & 2]), "r"(B[1 + (j & 2)]));
    __syncthreads();
  }
  for (int j = 0; j < 8; j++) for (int i = 0; i < 4; i++) out[(j * 4 + i) * blockDim.x + threadIdx.x] = D[j][i];
}
"""

RNG = np.random.default_rng(0)
NAN = np.uint32(0xFFFFFFFF).view(np.float32)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    source = tmp_path_factory.mktemp("ptx") / "kernels.cu"
    source.write_text(SOURCE)
    flags = ["-O3", "-std=c++20", "-arch=sm_80", "-ptx", "-o", source.with_suffix(".ptx")]
    compiler = subprocess.run([CUDA_HOME / "bin/nvcc", *flags, source], capture_output=True, text=True, check=False)
    assert compiler.returncode == 0, compiler.stderr
    return ptx.Module(source.with_suffix(".ptx").read_text()).kernels


def launch(kernel, *arguments, threads=32, blocks=1, shared_bytes=0, seed=0):
    """Launch with arrays (as pointers) and integers as parameters."""
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    packed = b""
    for a in arguments:
        packed += struct.pack("<Q", a.ctypes.data) if isinstance(a, np.ndarray) else struct.pack("<I", a)
    return ptx.launch(
        kernel,
        grid=(blocks, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=shared_bytes,
        parameters=packed,
        memory=ptx.Memory(arrays),
        seed=seed,
    )


def handwritten(body, registers=".reg .b32 %r<9>; .reg .b64 %rd<4>; .reg .pred %p<4>; .reg .f32 %f<4>;"):
    """A kernel of one pointer (in %rd1), around some PTX."""
    text = f".visible .entry k(.param .u64 k_param_0) {{ {registers} ld.param.u64 %rd1, [k_param_0]; {body} ret; }}"
    return ptx.Module(text).kernels["k"]


def ulps(got, expected):
    """The largest difference in units of the last place of float32."""
    expected = np.asarray(expected, np.float64)
    unit = np.spacing(np.maximum(np.abs(expected), 1e-30).astype(np.float32)).astype(np.float64)
    return (np.abs(got.astype(np.float64) - expected) / unit).max()


def c_division(a, b):
    """Quotients and remainders that truncate toward zero, exactly."""
    quotients = [
        abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    return np.array(quotients), np.array([x - y * q for x, y, q in zip(a.tolist(), b.tolist(), quotients, strict=True)])


def wrap(values, dtype):
    """Exact integers (a list or an array of objects) modulo the type's range."""
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([int(v) & ((1 << bits) - 1) for v in values], f"u{bits // 8}").view(dtype)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@needs_nvcc
def test_integers(kernels):
    a, b = (RNG.integers(-(2**31), 2**31, 64).astype(np.int32) for _ in range(2))
    a[:8], b[:8] = [7, -7, 7, -7, 2**31 - 1, -(2**31), 0, 5], [2, 2, -2, -2, -3, 3, 9, -8]
    out = np.zeros((64, 16), np.int32)
    launch(kernels["integers"], a, b, out, blocks=2)
    u, v, x, y = a.view(np.uint32), b.view(np.uint32), a.astype(object), b.astype(object)
    ux, uy = u.astype(object), v.astype(object)
    quotient, remainder = c_division(a, b)
    popc = [bin(i).count("1") + 100 * (32 - i.bit_length()) + 10000 * (i & -i).bit_length() for i in u.tolist()]
    data = np.stack([u, v], 1).view(np.uint8).astype(np.uint32)
    expected = [
        *(quotient, remainder, ux // uy, ux % uy, x * y, x * y >> 32, ux * uy >> 32),
        *(x >> (uy & 31), ux >> (uy & 31), [i << (j & 31) for i, j in zip(x, uy, strict=True)]),
        (uy * 2**32 + ux << 5) >> 32,  # __funnelshift_l(low, high): the upper word
        uy,  # __funnelshift_rc: at most all of the lower word goes
        popc,
        [int(f"{i:032b}"[::-1], 2) for i in u.tolist()],
        data[:, 4] | data[:, 1] << 8 | data[:, 6] << 16 | data[:, 3] << 24,
        (u ^ v) & ~(u | np.uint32(0xF0F0)) | v & np.uint32(0x1234),
    ]
    for i, column in enumerate(expected):
        np.testing.assert_array_equal(out[:, i], wrap(column, np.int32), err_msg=f"result {i}")


@needs_nvcc
def test_bit_fields(kernels):
    x = RNG.integers(-(2**31), 2**31, 64).astype(np.int32)
    start, count = RNG.integers(0, 40, 64), RNG.integers(0, 40, 64)
    count[:4] = 0, 32, 33, 1
    start[:4] = 3, 0, 0, 31
    out = np.zeros((64, 4), np.int32)
    launch(kernels["bits"], x, (start | count << 8).astype(np.uint32), out, blocks=2)
    for i, (value, p, n) in enumerate(zip(x.tolist(), start.tolist(), count.tolist(), strict=True)):
        word, ones = value & 0xFFFFFFFF, (1 << n) - 1
        # The manual's words: bit i of the result is bit p + i, and the sign is the field's last bit or bit 31
        sign = (word >> min(p + n - 1, 31) & 1) if n else 0
        signed = [word >> p + j & 1 if j < n and p + j <= 31 else sign for j in range(32)]
        unsigned = word >> p & ones if p < 32 else 0
        mask = ones << p & 0xFFFFFFFF
        inserted = 0x5A5A5A5A & ~mask | word << p & mask
        assert (
            out[i].tolist()[:3] == wrap([sum(b << j for j, b in enumerate(signed)), unsigned, inserted], "i4").tolist()
        )
    parts = x.astype(np.int8).astype(np.int32) + x.astype(np.int16) + (x >> 8).astype(np.uint8)
    np.testing.assert_array_equal(out[:, 3], parts)


@needs_nvcc
def test_long_integers(kernels):
    a, b = (RNG.integers(-(2**63), 2**63 - 1, 32) for _ in range(2))
    a[:4], b[:4] = [7, -7, 7, -7], [2, 2, -2, -2]
    b[4:16] //= 2**40
    out = np.zeros((32, 6), np.int64)
    launch(kernels["long_integers"], a, b, out)
    x, y = a.astype(object), b.astype(object)
    bits = [bin(i).count("1") + 100 * (64 - i.bit_length()) for i in a.view(np.uint64).tolist()]
    narrow = a.astype(np.int32).astype(object) * b.astype(np.int32).astype(object) + y
    for i, column in enumerate([*c_division(a, b), x * y, x * y >> 64, bits, narrow]):
        np.testing.assert_array_equal(out[:, i], wrap(column, np.int64), err_msg=f"result {i}")


def awkward_floats(count):
    """Numbers of every size, and those that conversions to 16 bits get wrong."""
    values = (RNG.standard_normal(count) * 10.0 ** RNG.uniform(-9, 6, count)).astype(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, 3.4e38, 1e-45, 2**-25, 1.5 * 2**-24, 2**-14]
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 2049.0, 2051.0]
    values[: len(special) + len(ties)] = special + ties
    return values


@needs_nvcc
def test_conversions_to_16_bits(kernels):
    x = awkward_floats(128)
    h, b = np.zeros(128, np.float16), np.zeros(128, np.uint16)
    pairs, back = np.zeros((128, 2), np.uint32), np.zeros((128, 2), np.float32)
    launch(kernels["halves"], x, h, b, pairs, back, blocks=4)
    with np.errstate(over="ignore"):
        as_f16 = x.astype(np.float16)
    as_bf16 = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(h, as_f16)  # NaN equals NaN here
    np.testing.assert_array_equal(back[:, 0], as_f16.astype(np.float32))
    np.testing.assert_array_equal(back[:, 1], as_bf16)
    assert (np.signbit(back) == np.signbit(x)[:, None])[~np.isnan(x)].all()
    other = np.arange(128) ^ 1
    lower, upper = (pairs & 0xFFFF).astype(np.uint16), (pairs >> 16).astype(np.uint16)
    np.testing.assert_array_equal(upper[:, 0].view(np.float16), as_f16)  # the first source is the upper half
    np.testing.assert_array_equal(lower[:, 0].view(np.float16), as_f16[other])
    np.testing.assert_array_equal(upper[:, 1], b)
    np.testing.assert_array_equal(lower[:, 1], b[other])


@needs_nvcc
def test_arithmetic_of_16_bits(kernels):
    a = RNG.standard_normal((32, 3, 2)).astype(np.float16)
    b = torch.from_numpy(RNG.standard_normal((32, 3, 2))).to(torch.bfloat16)
    o, p = np.zeros((32, 5, 2), np.float16), np.zeros((32, 5, 2), np.int16)
    launch(kernels["half_arithmetic"], a, b.view(torch.int16).numpy(), o, p)

    def results(values, rounded):
        x, y, z = (values[:, i].astype(np.float64) for i in range(3))
        return np.stack([rounded(v) for v in (x + y, x * y, x * y + z, np.maximum(x, y), -x)], 1)

    np.testing.assert_array_equal(o, results(a, lambda v: v.astype(np.float16)))
    got = torch.from_numpy(p).view(torch.bfloat16).float().numpy()
    nearest = results(b.float().numpy(), lambda v: round_to_bits(v, 8))
    np.testing.assert_array_equal(got, nearest)


def round_to_bits(values, bits):
    """To nearest even with so many bits of precision, from float64."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 2.0**bits), exponent - bits)


def test_bf16_is_rounded_once():
    """1 + 2^-8 + 2^-40 is above the tie; rounded to float32 first, it would be the tie and become 1."""
    values = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, 1 + 2**-8, 1 + 3 * 2**-8 - 2**-40, 1e39, -1e39])
    with np.errstate(over="ignore"):
        rounded = ptx.TYPES["bf16"].decode(ptx.TYPES["bf16"].encode(values))
    assert rounded.tolist() == [1 + 2**-7, 1, 1, 1 + 2**-7, math.inf, -math.inf]


@needs_nvcc
def test_floats_to_integers_saturate(kernels):
    x = awkward_floats(64)
    x[40:46] = 0.5, 1.5, -0.5, -1.5, 2147483648.0, -2147483904.0
    out = np.zeros((64, 5), np.int32)
    launch(kernels["to_integers"], x, out, blocks=2)
    finite = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    for i, function in enumerate((np.rint, np.trunc, np.floor, np.ceil)):
        np.testing.assert_array_equal(out[:, i], np.clip(function(finite), -(2.0**31), 2.0**31 - 1).astype(np.int32))
    np.testing.assert_array_equal(
        out[:, 4].view(np.uint32), np.clip(np.trunc(finite), 0, 2.0**32 - 1).astype(np.uint32)
    )


@needs_nvcc
def test_functions(kernels):
    x = np.concatenate([np.linspace(-9, 9, 115), [0.0, -0.0, 1e-6, 0.5, 1.5, -2.5, 1e-3, 88, -87, 3.3, 2.5, 0.6, 0.55]])
    x = x.astype(np.float32)
    out = np.zeros((128, 12), np.float32)
    launch(kernels["functions"], x, out, blocks=4)
    d = x.astype(np.float64)
    expected = [
        *(np.vectorize(math.erf)(d), np.vectorize(lambda v: 0.5 * math.erfc(-v / 2**0.5))(d)),
        *(np.tanh(d), np.exp(d), np.exp(d), np.sin(d), np.log(np.abs(x) + np.float32(1e-3)), 1 / np.sqrt(d * d + 1)),
        *(d / 3, np.sqrt(np.abs(d)), np.copysign(np.floor(np.abs(d) + 0.5), d), np.exp(d)),
    ]
    # __expf multiplies by log2(e) in float32 first: its error grows with |x|
    allowed = [3, 8, 3, 130, 3, 3, 3, 3, 1, 1, 0, 1]
    errors = [ulps(out[:, i], column) for i, column in enumerate(expected)]
    assert all(e <= a for e, a in zip(errors, allowed, strict=True)), errors


@needs_nvcc
def test_comparisons(kernels):
    values = np.array([0, -0.0, 1, -1, np.nan, np.inf, 2, -2], np.float32)
    a, b = (g.ravel().copy() for g in np.meshgrid(values, values))
    out = np.zeros(64, np.int32)
    launch(kernels["compares"], a, b, out, blocks=2)
    results = [a < b, a <= b, a == b, a != b, ~(a < b), ~(a >= b), (a > b) & (b > 0), (a > b) | (b < 0)]
    results.append(np.fmax(a, b) == b)
    np.testing.assert_array_equal(out, sum(r.astype(np.int32) << i for i, r in enumerate(results)))


def test_handwritten_arithmetic():
    """What nvcc emits rarely: both results of setp, rounding down, flushing, float64 fma, and scopes of one name."""
    body = """
    { .reg .b32 t; mov.b32 t, 3; mov.b32 %r1, t; } { .reg .b16 t; mov.b16 t, 0x8001; cvt.s32.s16 %r2, t; }
    setp.lt.s32 %p1|%p2, %r1, 2; selp.s32 %r3, 1, 0, %p1; selp.s32 %r4, 1, 0, !%p2;
    mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f33000000; sub.rm.f32 %f3, %f1, %f2;
    mov.f32 %f2, 0f00000001; mul.ftz.f32 %f2, %f2, %f1; mov.b32 %r5, %f2;
    st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4}; st.global.v2.b32 [%rd1+16], {%f3, %r5};
    lop3.b32 %r6, %r1, %r2, %r5, 0x96; prmt.b32 %r7, %r2, %r1, 0x4aa0; st.global.v2.u32 [%rd1+24], {%r6, %r7};
    """
    out = np.zeros(8, np.int32)
    launch(handwritten(body), out, threads=1)
    below_one = np.nextafter(np.float32(1), np.float32(0)).view(np.int32)
    second = -32767 & 0xFFFFFFFF
    # Selectors, lowest byte first: 0: 0x01; a = 8 + 2: the sign of byte 2 (0xff), twice; 4: byte 0 of the second, 3
    assert out.tolist() == [3, -32767, 0, 0, below_one, 0, wrap([3 ^ second], "i4")[0], 0x03FFFF01]


def test_float64_fma_rounds_once():
    a = 1 + 2.0**-30
    values = np.array([a, a, -(a * a)])
    body = """ld.global.f64 a, [%rd1]; ld.global.f64 c, [%rd1+16]; fma.rn.f64 a, a, a, c; st.global.f64 [%rd1], a;"""
    launch(handwritten(body, ".reg .f64 a, c; .reg .b64 %rd<2>;"), values, threads=1)
    assert values[0] == 2.0**-60


# --- lanes, warps and memory ------------------------------------------------------------------------------------------


@needs_nvcc
def test_divergent_loops(kernels):
    trips = RNG.integers(0, 60, 64).astype(np.int32)
    out = np.zeros(64, np.int32)
    launch(kernels["divergent"], trips, out, blocks=2)
    expected = []
    for i, count in enumerate(trips.tolist()):
        total = 0
        for k in (k for k in range(count) if k % 3 != 1):
            total += k * (i % 32)
            if total > 400:
                break
        expected.append(total)
    assert out.tolist() == expected


@needs_nvcc
def test_shuffles_and_votes(kernels):
    x = RNG.standard_normal((2, 32)).astype(np.float32)
    sums, places, moved = np.zeros((2, 32), np.float32), np.zeros((2, 32), np.int32), np.zeros((2, 32, 4), np.float32)
    launch(kernels["warp_functions"], x, sums, places, moved, threads=64)
    np.testing.assert_allclose(sums, np.broadcast_to(x.sum(1, keepdims=True), (2, 32)), rtol=1e-5, atol=1e-5)
    assert (sums == sums[:, :1]).all()
    np.testing.assert_array_equal(places, np.cumsum(x > 0, 1) - (x > 0) + 1000)
    lane = np.arange(32)
    sources = [np.where(lane < 3, lane, lane - 3), np.where(lane > 26, lane, lane + 5), lane // 16 * 16 + 7]
    sources.append(np.where(lane % 8 > 5, lane, lane + 2))
    for i, source in enumerate(sources):
        np.testing.assert_array_equal(moved[:, :, i], x[:, source], err_msg=f"shuffle {i}")


@needs_nvcc
@pytest.mark.parametrize("seed", [0, 1])
def test_tree_reduction(kernels, seed):
    x = RNG.integers(-9, 9, (3, 128)).astype(np.float32)
    out, counter = np.zeros((3, 128), np.float32), np.array([5, -1], np.int32)
    statistics = launch(kernels["tree"], x, out, counter, threads=128, blocks=3, shared_bytes=512, seed=seed)
    np.testing.assert_array_equal(out, x.sum(1, keepdims=True) + x[:, ::-1])
    assert counter.tolist() == [5 + 12, 383]
    assert statistics.count("bar.sync") == 3 * 4 * 8
    assert statistics.instructions == sum(statistics.opcodes.values()) > 0


@needs_nvcc
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_tile(kernels, dtype, trans):
    a, b = (torch.from_numpy(RNG.standard_normal(shape)).to(dtype) for shape in ((16, 16), (16, 8)))
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    d = np.zeros_like(c)
    stored = b if trans else b.t().contiguous()
    bits = [m.view(torch.int16).numpy().copy() for m in (a, stored)]
    launch(kernels["tile_f16" if dtype == torch.float16 else "tile_bf16"], *bits, c, d, int(trans))
    np.testing.assert_allclose(d, (a.double() @ b.double()).numpy() + c, rtol=1e-5, atol=1e-5)


@needs_nvcc
def test_matrix_tile_of_int8(kernels):
    a, b = RNG.integers(-128, 128, (16, 32)).astype(np.int8), RNG.integers(-128, 128, (8, 32)).astype(np.int8)
    c = RNG.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
    d = np.zeros_like(c)
    launch(kernels["tile_int8"], a, b, c, d)
    exact = a.astype(np.int64) @ b.T.astype(np.int64) + c
    np.testing.assert_array_equal(d.ravel(), wrap(exact.ravel(), np.int32))


@needs_nvcc
def test_asynchronous_copies(kernels):
    data = RNG.standard_normal((32, 4)).astype(np.float32)
    sizes = np.tile(np.array([16, 0, 4, 12, 16, 6, 16, 8], np.int32), 4)
    kept = data.view(np.uint8).copy()
    kept[np.arange(16) >= sizes[:, None]] = 0
    whole, even, none = (np.zeros((32, 4), np.float32) for _ in range(3))
    launch(kernels["async_copy"], data, sizes, whole, 0, shared_bytes=512)
    launch(kernels["async_copy"], data, sizes, none, 1, shared_bytes=512)
    launch(kernels["async_copy"], data, sizes, even, 2, shared_bytes=512)
    np.testing.assert_array_equal(whole, kept.view(np.float32))
    assert np.isnan(none).all()
    np.testing.assert_array_equal(even[::2], whole[::2])
    assert np.isnan(even[1::2]).all()


@needs_nvcc
def test_copies_read_no_further_than_their_size(kernels):
    """The last row has 6 bytes: a copy of 6 is right, and one of 8 is a fault."""
    data, out = np.arange(31 * 8 + 3, dtype=np.float16), np.zeros((32, 8), np.float16)
    sizes = np.full(32, 16, np.int32)
    sizes[31] = 6
    launch(kernels["async_copy"], data, sizes, out, 0, shared_bytes=512)
    np.testing.assert_array_equal(out.ravel()[: data.size], data)
    assert not out.ravel()[data.size :].any()
    sizes[31] = 8
    with pytest.raises(ptx.Fault, match="out-of-bounds read"):
        launch(kernels["async_copy"], data, sizes, out, 0, shared_bytes=512)


@needs_nvcc
def test_structure_by_value(kernels):
    x, out = RNG.standard_normal(100).astype(np.float32), np.full(100, NAN)
    kernel = kernels["by_value"]
    packed = struct.pack("<QQifHxxxxxxi", x.ctypes.data, out.ctypes.data, 100, 0.5, 65535, -7)
    assert kernel.parameter_bytes == len(packed) == 36
    arguments = {"shared_bytes": 0, "parameters": packed, "memory": ptx.Memory([x, out])}
    ptx.launch(kernel, grid=(4, 1, 1), block=(32, 1, 1), blocks=[(3, 0, 0)], **arguments)
    assert np.isnan(out[:96]).all()  # only the last block ran
    ptx.launch(kernel, grid=(4, 1, 1), block=(32, 1, 1), **arguments)
    np.testing.assert_array_equal(out, (x * np.float32(0.5) + np.float32(-7)) + np.float32(65535))
    with pytest.raises(ValueError, match="bytes of parameters"):
        ptx.launch(kernel, (4, 1, 1), (32, 1, 1), 0, packed[:-1], ptx.Memory([x, out]))


@needs_nvcc
def test_local_arrays(kernels):
    order, out = RNG.permutation(8).astype(np.int32), np.zeros(32, np.int32)
    launch(kernels["local_array"], order, out)
    lane = np.arange(32)
    np.testing.assert_array_equal(out, 10 * np.argsort(order)[lane % 8] + lane)


# --- faults -----------------------------------------------------------------------------------------------------------


@needs_nvcc
def test_global_access_outside_arrays_is_a_fault(kernels):
    x, out = np.zeros(64, np.float32), np.zeros(64, np.int32)
    launch(kernels["to_integers"], x[:32], np.zeros((32, 5), np.int32))
    for source, target, kind in ((x[:31], np.zeros((32, 5), np.int32), "read"), (x, np.zeros(159, np.int32), "write")):
        with pytest.raises(
            ptx.Fault, match=f"block .* warp 0: out-of-bounds {kind} of 4 bytes .* by lane .* in: .*global"
        ):
            launch(kernels["to_integers"], source, target)
    out.flags.writeable = False
    with pytest.raises(ptx.Fault, match="read-only"):
        launch(kernels["divergent"], np.zeros(32, np.int32), out)


def test_arrays_must_be_contiguous_and_apart():
    x = np.zeros((8, 8))
    assert len(ptx.Memory([x, x, x[:0]]).segments) == 1  # the same array twice is fine, and so is an empty one
    with pytest.raises(ValueError, match="not contiguous"):
        ptx.Memory([x[:, 1:]])
    with pytest.raises(ValueError, match="overlap"):
        ptx.Memory([x, x[2:4]])


@needs_nvcc
@pytest.mark.parametrize("index", [16, -1])
def test_shared_access_outside_is_a_fault(kernels, index):
    out = np.zeros(32, np.float32)
    launch(kernels["shared_access"], out, 15, shared_bytes=64)
    with pytest.raises(ptx.Fault, match="out-of-bounds write of 4 bytes"):
        launch(kernels["shared_access"], out, index & 0xFFFFFFFF, shared_bytes=64)


@needs_nvcc
def test_misaligned_access_is_a_fault(kernels):
    with pytest.raises(ptx.Fault, match="misaligned access of 4 bytes"):
        launch(kernels["misaligned"], np.zeros(256, np.uint8), np.zeros(32, np.int32), 2)


@needs_nvcc
@pytest.mark.parametrize(("threads", "reason"), [(40, "barrier in divergent code"), (32, "deadlock")])
def test_barrier_that_not_all_reach_is_a_fault(kernels, threads, reason):
    out = np.zeros(64, np.int32)
    launch(kernels["divergent_barrier"], out, 64, threads=64)
    with pytest.raises(ptx.Fault, match=reason):
        launch(kernels["divergent_barrier"], out, threads, threads=64)


@needs_nvcc
def test_shuffle_with_inactive_lanes_is_a_fault(kernels):
    out = np.zeros(16, np.int32)
    launch(kernels["partial_shuffle"], out, 0xFFFF)
    assert out.tolist() == [i ^ 1 for i in range(16)]
    for mask, reason in ((0xFFFFFFFF, "names lanes that do not execute"), (0xFF, "does not name")):
        with pytest.raises(ptx.Fault, match=reason):
            launch(kernels["partial_shuffle"], out, mask)


@needs_nvcc
def test_trap_and_too_many_threads(kernels):
    out = np.zeros(1, np.int32)
    launch(kernels["stops"], out)
    out[:] = 1
    with pytest.raises(ptx.Fault, match="trap"):
        launch(kernels["stops"], out)
    with pytest.raises(ValueError, match="compiled for 1024"):
        launch(kernels["stops"], out, threads=1056)


#: Lanes 4 to 31 exit.
FIRST_FOUR = "mov.u32 %r1, %laneid; setp.gt.u32 %p1, %r1, 3; @%p1 exit; "


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("add.s32 %r1, %r2, 1;", "register %r2 is read before it is written"),
        # Written by lane 0 only
        ("mov.u32 %r1, %laneid; setp.eq.u32 %p1, %r1, 0; @%p1 mov.b32 %r2, 5; add.s32 %r3, %r2, 1;", "register %r2"),
        ("@%p1 mov.b32 %r2, 5;", "register %p1"),
        ("call.uni foo, (%r1);", "unsupported"),
        (FIRST_FOUR + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];", "only lanes 0xf execute"),
        (FIRST_FOUR + "bar.sync 0;", "barrier in divergent code"),
        (FIRST_FOUR + "shfl.sync.idx.b32 %r2, %r1, 5, 31, 15;", "a lane reads from one that does not execute"),
        ("ld.param.u32 %r1, [k_param_0+8];", "the parameters"),
    ],
)
def test_handwritten_faults(body, reason):
    with pytest.raises(ptx.Fault, match=re.escape(reason)):
        launch(handwritten(body), np.zeros(1, np.int32))


def test_what_is_unsupported_faults_only_where_it_is_executed():
    body = "mov.u32 %r1, 0; setp.eq.u32 %p1, %r1, 0; @%p1 bra $L; call.uni foo, (%r1); $L: st.global.u32 [%rd1], 7;"
    out = np.zeros(1, np.int32)
    launch(handwritten(body), out, threads=1)
    assert out[0] == 7


def test_poison_where_the_compiler_says_that_the_value_does_not_matter():
    out = np.zeros(1, np.int32)
    launch(handwritten("// implicit-def: %r1\n st.global.u32 [%rd1], %r1;"), out, threads=1)
    assert out[0] == -1


@needs_nvcc
def test_inner_loop_of_a_gemm(kernels):
    """Also what to run to see the interpreter's speed."""
    data, out = RNG.standard_normal((32, 8)).astype(np.float16), np.zeros((32, 32), np.float32)
    statistics = launch(kernels["inner_loop"], data, out, 4, shared_bytes=512)
    assert statistics.count("mma") == 32
    assert statistics.count("ldmatrix") == 8
    # Matrix i of ldmatrix.x4 is rows 8i to 8i + 7: the first operand is [[0, 2], [1, 3]], the second [[0], [1]] or
    # [[2], [3]], transposed
    m = data.astype(np.float64).reshape(4, 8, 8)
    first = np.block([[m[0], m[2]], [m[1], m[3]]])
    results = out.reshape(8, 4, 32)
    for j in range(8):
        second = np.concatenate([m[j & 2].T, m[1 + (j & 2)].T])
        expected = 4 * first @ second
        got = np.zeros((16, 8))
        lane = np.arange(32)
        for i in range(4):
            got[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = results[j, i]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
