#define MOD_FUSED_LOOPS avx512_loops
#define MOD_FUSED_LOOPS_NAME "avx512"
#include "tiles.inl"
