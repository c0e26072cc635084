// The loops that every machine of the architecture can run: SSE2 on x86-64, NEON on 64-bit ARM, plain C++ elsewhere.
#define MOD_FUSED_LOOPS baseline_loops
#if defined(__ARM_NEON)
#define MOD_FUSED_LOOPS_NAME "neon"
#else
#define MOD_FUSED_LOOPS_NAME "baseline"
#endif
#include "tiles.inl"
