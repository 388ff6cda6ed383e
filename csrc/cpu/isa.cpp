#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#if PACKEDBERT_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace packedbert::cpu {
namespace {

#if PACKEDBERT_X86

constexpr bool has_bits(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

// XCR0: the register files that the operating system saves when it switches threads. XGETBV may be run only
// where CPUID reports OSXSAVE; it is written as assembly because the intrinsic wants -mxsave.
uint64_t saved_register_files() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux lets a process use AMX's tiles, 8 KiB a thread, only after it has asked for them (Linux,
// Documentation/arch/x86/xstate.rst). What it grants holds for the process's threads and children.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

std::vector<Isa> detect() {
  std::vector<Isa> isas{Isa::scalar};
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
  constexpr uint32_t fma_osxsave_avx = (1u << 12) | (1u << 27) | (1u << 28);
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_bits(ecx, fma_osxsave_avx)) return isas;

  constexpr uint64_t sse_and_ymm = 0x06;
  constexpr uint64_t masks_and_zmm = 0xe0;
  const uint64_t saved = saved_register_files();
  constexpr uint32_t avx2 = 1u << 5;
  constexpr uint32_t avx512_f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  if (!has_bits(saved, sse_and_ymm) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return isas;
  if (!has_bits(ebx, avx2)) return isas;
  isas.push_back(Isa::avx2);
  const bool has_avx512 = has_bits(ebx, avx512_f_dq_bw_vl) && has_bits(saved, masks_and_zmm);
  constexpr uint32_t avx512_vnni = 1u << 11;
  const bool has_avx512_vnni = has_avx512 && has_bits(ecx, avx512_vnni);
  constexpr uint64_t tile_config_and_data = 0x60000;
  constexpr uint32_t amx_bf16_tile_int8 = (1u << 22) | (1u << 24) | (1u << 25);
  const bool has_amx =
      has_avx512_vnni && has_bits(edx, amx_bf16_tile_int8) && has_bits(saved, tile_config_and_data);
  constexpr uint32_t avx_vnni = 1u << 4;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && has_bits(eax, avx_vnni))
    isas.push_back(Isa::avx2_vnni);
  if (has_avx512) isas.push_back(Isa::avx512);
  if (has_avx512_vnni) isas.push_back(Isa::avx512_vnni);
  if (has_amx && may_use_tiles()) isas.push_back(Isa::avx512_amx);
  return isas;
}

#else

std::vector<Isa> detect() { return {Isa::scalar}; }

#endif

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{available_isas().back()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx2_vnni:
      return "avx2_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_amx:
      return "avx512_amx";
  }
  return "unknown";
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

bool set_active_isa(Isa isa) {
  const std::vector<Isa>& available = available_isas();
  if (std::find(available.begin(), available.end(), isa) == available.end()) return false;
  active().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace packedbert::cpu
