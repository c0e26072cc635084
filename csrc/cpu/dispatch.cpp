// Chooses the instruction set whose loops run, once.

#include <cstdlib>
#include <cstring>

#include "tiles.h"

namespace mod_fused {

namespace {

const TileLoops* choose() {
  const TileLoops* best = baseline_loops();
  const char* wanted = std::getenv("MOD_FUSED_CPU_ISA");
  const TileLoops* supported[3] = {best, nullptr, nullptr};
#if defined(MOD_FUSED_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) supported[1] = avx2_loops();
  if (supported[1] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    supported[2] = avx512_loops();
#endif
  for (const TileLoops* loops : supported) {
    if (!loops) continue;
    if (wanted && std::strcmp(wanted, loops->name) == 0) return loops;
    best = loops;
  }
  return best;
}

}  // namespace

const TileLoops& tile_loops() {
  static const TileLoops* const loops = choose();
  return *loops;
}

}  // namespace mod_fused
