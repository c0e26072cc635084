#define MOD_FUSED_LOOPS avx2_loops
#define MOD_FUSED_LOOPS_NAME "avx2"
#include "tiles.inl"
