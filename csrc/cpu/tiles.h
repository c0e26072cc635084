// The loops over a tile of at most 1024 tokens: a table of functions for each instruction set. The code that calls them is
// scalar and compiled once.
#pragma once

#include <stdint.h>

#include "../own_mass.h"

namespace mod_fused {

constexpr int kTile = 1024;      // token ids per tile; another number would draw other tokens
constexpr int kMaxTerms = 32;    // models and value tensors of one row

enum class DType : int32_t { float32, float16, bfloat16 };

// A row of logits or values: element i counts as data[i] * scale.
struct Source {
  const void* data;
  DType dtype;
  float scale;
};

// One summand c * x of the log-linear sum.
struct Term {
  Source source;
  float weight;
};

// max x and sum exp(x - max); the sum is NaN if x holds NaN or +inf.
struct PeakSum {
  float peak, sum;
};

// Sum of exp(key - from), and the least key.
struct KeySum {
  float sum, least;
};

struct TileMix {
  float peak;   // of the key; -inf where no token is left
  bool broken;  // a tensor that counts holds NaN or +inf
};

// Q of a token outside the support: finite, but so large that H is 0 in float32.
constexpr float kExcluded = 1e37f;

// Sums over a tile, for the bracket of tau and the first step.
struct DeficitSums {
  double least;         // min Q (if fused, min u) over the support; kExcluded if that is empty
  double mass, first;   // sum p, sum p Q
  double s1, s2;        // if fused: as in MassSums with y = u, that is at Z = 0
};

// The tensors of a tile whose p and u one loop computes: the reference and up to three policies, of one dtype, unscaled.
constexpr int kMaxFused = 3;
struct DeficitTile {
  const void* ref;
  const void* policies[kMaxFused];
  float offsets[kMaxFused], weights[kMaxFused];  // y = factor * (policy - ref) + offset, divergence.h
  int count;
  DType dtype;
  float factor, limit;                // of y; the largest |y| for which `term` and the sum are right
  float log_norm, log_norm_offset;    // of the reference; -log_norm * log2(e)
  bool careful;                       // y may exceed the limit on the side that the fast loop does not check
};

struct MassSums {
  float s1, s2;  // sum p H, and -dH/dt / order
};

struct RaceResult {
  int32_t winner;
  float arrival;
};

// The loops of one divergence. `parameter` is alpha, or log m of the divergences of own_mass.h; the others do not read it.
struct DivergenceLoops {
  // Computes p and u of a tile in one loop; null for those of own_mass.h.
  DeficitSums (*deficits)(const DeficitTile& tile, int n, float parameter, float* p, float* u);
  // Q += w * deficit(max((policy - ref) + shift, floor)); NaN where the policy excludes the token.
  void (*add_deficit)(const float* ref, const float* policy, int n, float parameter, float shift, float floor, float w, float* q);
  // Replaces Q by u = excess(Q + tilt - least), whose base is 0; tilt may be null.
  void (*excesses)(float* q, const double* tilt, int n, float parameter, double least);
  // s1 and s2 of a tile at t.
  MassSums (*sums)(const float* p, const float* u, int n, float parameter, float base, float t);
  // The tokens' masses: p * H without the factor e^constant.
  void (*masses)(const float* p, const float* u, int n, float parameter, float base, float t, float* out);
  // log p + log H, -inf off the support.
  void (*keys)(const float* p, const float* u, int n, float parameter, float base, float t, float constant, float* out);
};

// The loops of masks and filters, over keys.
constexpr int kGroups = 64;  // groups of a tile, for top-k
struct FilterLoops {
  float (*peak)(const float* key, int n);
  float (*least)(const float* key, int n);
  // Set the keys that the mask forbids to -inf.
  void (*mask_bytes)(const uint8_t* allowed, int n, float* key);
  void (*mask_bits)(const int32_t* words, int n, float* key);
  // The highest bias of a token whose key is not -inf; NaN if some bias is NaN or +inf.
  float (*highest_bias)(const float* key, const float* bias, int n);
  // key = (key - level) + (bias - highest), so that neither rounds the other away; -inf stays.
  void (*add_bias)(const float* bias, int n, float level, float highest, float* key);
  // Writes the peaks of the tile's groups, at most kGroups; returns how many.
  int (*group_peaks)(const float* key, int n, float* out);
  // Copies the keys >= least in their order and returns how many; `out` needs room for n.
  int (*above)(const float* key, int n, float least, float* out);
  // Moves the keys whose bucket is the wanted one to the front and returns how many.
  int (*pick)(const uint32_t* bucket, uint32_t wanted, int n, float* key);
  // (key - least) * scale, rounded down
  void (*spread)(const float* key, int n, float least, float scale, uint32_t* out);
  // (ordered(key) - base) >> shift
  void (*buckets)(const float* key, int n, uint32_t base, int shift, uint32_t* out);
  // Sum of floor(2^40 exp((key - peak) * beta)) over keys >= least: a sum of integers does not depend on the order.
  int64_t (*fixed_mass)(const float* key, int n, float least, float peak, float beta);
  void (*fixed_masses)(const float* key, int n, float peak, float beta, int64_t* out);
  // exp((key - peak) * beta), 0 where the key is below `least` or the exponent below `log_min_p`; returns their sum.
  float (*kept_masses)(const float* key, int n, float peak, float beta, float least, float log_min_p, float* out);
};

struct TileLoops {
  const char* name;
  void (*load)(const Source& x, int64_t begin, int n, float* out);
  PeakSum (*peak_sum)(const Source& x, int64_t begin, int n);
  // The log-linear keys of a tile, -inf off the support. All backends add the terms in the same order.
  TileMix (*log_linear)(const Term* terms, int count, int64_t begin, int n, float* key);
  // The same without storing the keys. The result is right only if the sum and the least key are finite.
  KeySum (*log_linear_sum)(const Term* terms, int count, int64_t begin, int n, float from);
  // sum exp(x - from); not finite where x holds NaN or +inf, or is far above `from`.
  float (*sum_from)(const Source& x, int64_t begin, int n, float from);
  // sum exp((key - peak) * beta)
  float (*sum_exp)(const float* key, int n, float peak, float beta);
  void (*exps)(const float* key, int n, float peak, float beta, float* out);
  // tilt -= v * values; +inf where a value excludes the token. Returns whether a value is NaN or +inf.
  bool (*add_tilt)(const float* values, int n, float v, double* tilt);
  // Computes p = exp(ref - log_norm), and sets p = 0 and Q = kExcluded off the support. The sums are those of Q + tilt; tilt is
  // null without values.
  DeficitSums (*close_deficit)(const float* ref, const double* tilt, int n, float log_norm, float* p, float* q);
  // argmin of E(seed, position, index + i, stream) / mass[i] and that minimum; winner -1 if no mass is positive.
  RaceResult (*race)(const float* mass, int n, uint64_t seed, uint64_t position, uint32_t index, uint32_t stream);
  // (key - level) - log_norm
  void (*normalised)(const float* key, int n, double level, double log_norm, float* out);
  FilterLoops filters;
  DivergenceLoops divergences[LoopDivergences::size];
};

const TileLoops* baseline_loops();
#if defined(MOD_FUSED_X86)
const TileLoops* avx2_loops();
const TileLoops* avx512_loops();
#endif

// The loops for this machine, or those that the environment variable MOD_FUSED_CPU_ISA names.
const TileLoops& tile_loops();

}  // namespace mod_fused
