// What the normaliser costs three ways, forward KL, V = 128256, one thread (bench/README.md, "Moments or evaluations"):
//
//   g++ -O3 -march=native -mprefer-vector-width=512 -std=c++17 -fno-math-errno -fno-trapping-math -fopenmp-simd \
//       bench/normaliser.cpp -o build/normaliser && build/normaliser

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/scalar_math.h"

namespace {

using mod_fused::reciprocal;
constexpr int kTile = 1024, kTiles = 126, kMoments = 8, kNodes = 4;

// sum p r and sum p r^2 of a tile: what an evaluation of G and its slope reads.
__attribute__((noinline)) void evaluate(const float* p, const float* x, float t, float* out) {
  float s1 = 0.0f, s2 = 0.0f;
#pragma omp simd reduction(+ : s1, s2)
  for (int i = 0; i < kTile; ++i) {
    const float r = reciprocal(t + x[i]), g = p[i] * r;
    s1 += g;
    s2 += g * r;
  }
  out[0] = s1;
  out[1] = s2;
}

// Eight moments of y = t / (t + x) under p / (t + x).
__attribute__((noinline)) void moments(const float* p, const float* x, float t, float* out) {
  float m0 = 0, m1 = 0, m2 = 0, m3 = 0, m4 = 0, m5 = 0, m6 = 0, m7 = 0;
#pragma omp simd reduction(+ : m0, m1, m2, m3, m4, m5, m6, m7)
  for (int i = 0; i < kTile; ++i) {
    const float r = reciprocal(t + x[i]), y = t * r;
    float u = p[i] * r;
    m0 += u, u *= y, m1 += u, u *= y, m2 += u, u *= y, m3 += u, u *= y;
    m4 += u, u *= y, m5 += u, u *= y, m6 += u, u *= y, m7 += u;
  }
  const float all[kMoments] = {m0, m1, m2, m3, m4, m5, m6, m7};
  std::copy(all, all + kMoments, out);
}

// Nodes and weights of the 4-node Gauss rule of 8 moments: Chebyshev's algorithm, then implicit QL on the Jacobi matrix.
__attribute__((noinline)) bool gauss(const float* moment, double* node, double* weight) {
  double below[kMoments] = {}, row[kMoments], above[kMoments], d[kNodes], e[kNodes] = {}, z[kNodes] = {1};
  for (int l = 0; l < kMoments; ++l) row[l] = moment[l];
  d[0] = row[1] / row[0];
  double last = 0.0;
  for (int k = 1; k < kNodes; ++k) {
    for (int l = k; l < kMoments - k; ++l) above[l] = row[l + 1] - d[k - 1] * row[l] - last * below[l];
    if (!(above[k] > 0.0)) return false;
    d[k] = above[k + 1] / above[k] - row[k] / row[k - 1];
    last = above[k] / row[k - 1];
    e[k - 1] = std::sqrt(last);
    std::copy(row, row + kMoments, below);
    std::copy(above, above + kMoments, row);
  }
  for (int l = 0; l < kNodes; ++l) {
    for (int iteration = 0; iteration < 30; ++iteration) {
      int m = l;
      while (m < kNodes - 1 && std::fabs(e[m]) > 1e-15 * (std::fabs(d[m]) + std::fabs(d[m + 1]))) ++m;
      if (m == l) break;
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      g = d[m] - d[l] + e[l] / (g + std::copysign(std::hypot(g, 1.0), g));
      double s = 1.0, c = 1.0, p = 0.0;
      for (int i = m - 1; i >= l; --i) {
        const double f = s * e[i], b = c * e[i], r = std::hypot(f, g);
        e[i + 1] = r;
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        const double q = (d[i] - g) * s + 2 * c * b;
        p = s * q;
        d[i + 1] = g + p;
        g = c * q - b;
        const double zi = z[i];
        z[i] = c * zi - s * z[i + 1];
        z[i + 1] = s * zi + c * z[i + 1];
      }
      d[l] -= p;
      e[l] = g;
      e[m] = 0.0;
    }
  }
  for (int i = 0; i < kNodes; ++i) {
    node[i] = d[i];
    weight[i] = z[i] * z[i] * moment[0];
  }
  return true;
}

template <class F> double median_us(const F& f) {
  std::vector<double> times;
  for (int repetition = 0; repetition < 101; ++repetition) {
    const auto start = std::chrono::steady_clock::now();
    f();
    times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 50, times.end());
  return times[50];
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> p(kTile * kTiles), x(p.size()), moment(kMoments * kTiles), sums(2);
  for (float& value : p) value = std::exp(3.0f * normal(generator)) / (float)p.size();
  for (float& value : x) value = std::exp(0.4f * normal(generator));
  const auto tiles = [](const auto& body) {
    for (int tile = 0; tile < kTiles; ++tile) body(tile);
  };
  double node[kNodes], weight[kNodes], checksum = 0.0;
  const double once = median_us([&] {
    tiles([&](int tile) { evaluate(&p[tile * kTile], &x[tile * kTile], 0.7f, sums.data()), checksum += sums[0]; });
  });
  const double all = median_us([&] {
    tiles([&](int tile) { moments(&p[tile * kTile], &x[tile * kTile], 0.7f, &moment[tile * kMoments]); });
  });
  const double rules = median_us([&] {
    tiles([&](int tile) { checksum += gauss(&moment[tile * kMoments], node, weight) ? node[0] : 0.0; });
  });
  std::printf("one evaluation of G %.0f us, eight moments %.0f us, %d Gauss rules %.0f us (checksum %g)\n", once, all,
              kTiles, rules, checksum);
  std::printf("two evaluations (secular equation) %.0f us, four (Newton) %.0f us, moments %.0f us\n", 2 * once,
              4 * once, all + rules);
}
