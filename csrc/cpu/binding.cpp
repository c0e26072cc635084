// The CPU backend as torch ops, on the stable ABI: tensors and lists in, a Request out. The Python side has checked shapes,
// dtypes and devices (mod_fused/checks.py) and packed them (mod_fused/arguments.py).

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../divergence.h"
#include "../philox.h"
#include "request.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace mod_fused;

DType dtype_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::BFloat16) return DType::bfloat16;
  return x.scalar_type() == ScalarType::Half ? DType::float16 : DType::float32;
}

const char* bytes(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }

Rows rows_of(const Tensor& x) { return {bytes(x), dtype_of(x), x.stride(0) * (int64_t)x.element_size()}; }

// Element i of a one-dimensional tensor, or of a row of a two-dimensional one.
template <class T> T number(const Tensor& x, int64_t offset) {
  const char* at = bytes(x) + offset * (int64_t)x.element_size();
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return (T)*reinterpret_cast<const double*>(at);
    case ScalarType::Float:
      return (T)*reinterpret_cast<const float*>(at);
    case ScalarType::Int:
      return (T)*reinterpret_cast<const int32_t*>(at);
    default:
      return (T)*reinterpret_cast<const int64_t*>(at);
  }
}

using Pointer = const Tensor*;  // null: not given

template <class T, class Host> PerRow<T> per_row(const std::vector<Host>& host, Pointer tensor) {
  PerRow<T> result;
  if (tensor) {
    for (int64_t b = 0; b < tensor->size(0); ++b) result.entries.push_back(number<T>(*tensor, b * tensor->stride(0)));
    if (result.entries.empty()) result.entries.push_back(T());
  } else {
    result.entries.assign(host.begin(), host.end());
  }
  return result;
}

PerRowVector per_row_vector(std::vector<double> host, Pointer tensor, int width) {
  if (!tensor) return {std::move(host), width};
  std::vector<double> entries;
  const bool matrix = tensor->dim() == 2;
  for (int64_t b = 0; b < (matrix ? tensor->size(0) : 1); ++b)
    for (int i = 0; i < width; ++i)
      entries.push_back(matrix ? number<double>(*tensor, b * tensor->stride(0) + i * tensor->stride(1))
                               : number<double>(*tensor, i * tensor->stride(0)));
  return {std::move(entries), width};
}

// Reads what `pack` of mod_fused/arguments.py wrote, in its order.
class Packed {
 public:
  Packed(const std::vector<Tensor>& tensors, const std::vector<int64_t>& integers, const std::vector<double>& numbers)
      : tensors_(tensors), integers_(integers), numbers_(numbers), present_(integer()) {}

  int64_t integer() { return integers_[claim(integers_, &next_integer_, 1)]; }
  double number() { return numbers_[claim(numbers_, &next_number_, 1)]; }
  const Tensor& tensor() { return tensors_[claim(tensors_, &next_tensor_, 1)]; }
  // The next tensor that may be absent; the reference is the first of them.
  Pointer optional() { return (present_ >> next_bit_++) & 1 ? &tensor() : nullptr; }
  std::vector<int64_t> integers(int64_t count) { return take(integers_, &next_integer_, count); }
  std::vector<double> numbers(int64_t count) { return take(numbers_, &next_number_, count); }

 private:
  // The index of the first of the next `count` entries.
  template <class T> static size_t claim(const std::vector<T>& from, size_t* next, int64_t count) {
    if (count < 0 || (uint64_t)count > from.size() - *next)
      throw std::runtime_error("mod_fused: the arguments are not what mod_fused/arguments.py packs");
    *next += (size_t)count;
    return *next - (size_t)count;
  }
  template <class T> static std::vector<T> take(const std::vector<T>& from, size_t* next, int64_t count) {
    const auto begin = from.begin() + (int64_t)claim(from, next, count);
    return {begin, begin + count};
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& integers_;
  const std::vector<double>& numbers_;
  size_t next_tensor_ = 0, next_integer_ = 0, next_number_ = 0;
  int next_bit_ = 0;
  int64_t present_;
};

// Uninitialised contiguous CPU tensor; straight from the allocator, a tenth of the cost of calling aten::empty.
Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  const int64_t strides[2] = {sizes.size() == 2 ? std::max<int64_t>(sizes[1], 1) : 1, 1};
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// What the ops have in common; the tensors must outlive the request.
Request mixture(Packed& packed, const std::string& divergence) {
  Request request;
  const Pointer reference = packed.optional();
  const int policies = (int)packed.integer();
  request.vocab = packed.integer();
  const int64_t plausibility_tensor = packed.integer();
  request.exact = packed.integer() != 0;
  const int64_t weights = packed.integer(), value_weights = packed.integer(), scales = packed.integer();
  const double plausibility = packed.number();

  request.reference = reference != nullptr;
  if (reference) {
    request.rows = reference->size(0);
    request.logits[request.models++] = rows_of(*reference);
  }
  for (int i = 0; i < policies; ++i) {
    const Tensor& x = packed.tensor();
    request.rows = x.size(0);
    request.logits[request.models++] = rows_of(x);
  }

  request.weights = per_row_vector(packed.numbers(weights), packed.optional(), policies);
  if (const Pointer values = packed.optional()) {
    const int count = (int)values->size(0);
    const int64_t step = values->stride(0) * (int64_t)values->element_size();
    for (int j = 0; j < count; ++j)
      request.values.push_back({bytes(*values) + j * step, dtype_of(*values),
                                values->stride(1) * (int64_t)values->element_size()});
  }
  if (const Pointer ids = packed.optional()) {
    request.value_ids = static_cast<const int64_t*>(ids->const_data_ptr());
    request.candidates = ids->size(1);
    request.value_ids_row = ids->stride(0);
    request.value_ids_column = ids->stride(1);
  }
  request.value_weights = per_row_vector(packed.numbers(value_weights), packed.optional(), (int)request.values.size());
  if (const Pointer prefix = packed.optional())
    for (int64_t b = 0; b < request.rows; ++b)
      for (int i = 0; i < request.models; ++i)
        request.prefix.push_back(number<double>(*prefix, b * prefix->stride(0) + i * prefix->stride(1)));
  for (int i = 0; i < request.models; ++i) request.scales[i] = scales == 0 ? 1.0f : (float)packed.number();

  request.kind = divergence == "reverse_kl"   ? Kind::reverse_kl
                 : divergence == "forward_kl" ? Kind::forward_kl
                 : divergence == "jsd"        ? Kind::jsd
                 : divergence == "jeffrey"    ? Kind::jeffrey
                                              : Kind::alpha;
  if (request.kind == Kind::alpha) request.alpha = std::stod(divergence.substr(divergence.find(':') + 1));
  if (plausibility > 0.0) {
    request.log_plausibility = (float)std::log(plausibility);
    request.plausibility_model = (int)plausibility_tensor - (request.reference ? 0 : 1);
  }
  return request;
}

void log_probs_out(const std::vector<Tensor>& tensors, const std::vector<int64_t>& integers,
                   const std::vector<double>& numbers, const std::string& divergence, Tensor out,
                   std::optional<Tensor> /*workspace*/) {
  Packed packed(tensors, integers, numbers);
  Request request = mixture(packed, divergence);
  request.log_probs = static_cast<float*>(out.mutable_data_ptr());
  run(request);
}

Tensor log_probs(const std::vector<Tensor>& tensors, const std::vector<int64_t>& integers,
                 const std::vector<double>& numbers, const std::string& divergence) {
  Packed packed(tensors, integers, numbers);
  Request request = mixture(packed, divergence);
  Tensor out = empty({request.rows, request.vocab}, ScalarType::Float);
  request.log_probs = static_cast<float*>(out.mutable_data_ptr());
  run(request);
  return out;
}

// A request for a draw, but for its outputs.
Request drawing(Packed& packed, const std::string& divergence) {
  Request request = mixture(packed, divergence);
  const int64_t temperatures = packed.integer(), top_ps = packed.integer(), min_ps = packed.integer(),
                top_ks = packed.integer(), positions = packed.integer();
  request.temperature = per_row<float>(packed.numbers(temperatures), packed.optional());
  request.top_k = per_row<int64_t>(packed.integers(top_ks), packed.optional());
  request.top_p = per_row<double>(packed.numbers(top_ps), packed.optional());
  request.min_p = per_row<float>(packed.numbers(min_ps), packed.optional());
  if (const Pointer mask = packed.optional()) {
    const int64_t size = (int64_t)mask->element_size();
    request.mask = {bytes(*mask), mask->scalar_type() == ScalarType::Int, mask->stride(0) * size,
                    mask->stride(1) * size};
  }
  const Pointer seeds = packed.optional();
  request.position = per_row<int64_t>(packed.integers(positions), packed.optional());
  const int64_t seed = packed.integer();
  request.model_logprobs = packed.integer() != 0;

  request.seeds = per_row<uint64_t>(std::vector<int64_t>(), seeds);
  for (int64_t b = 0; b < request.rows && !seeds; ++b)
    request.seeds.entries.push_back(split_mix((uint64_t)seed + (uint64_t)b));
  request.filters = request.mask.data != nullptr;
  for (int64_t k : request.top_k.entries) request.filters |= k > 0;
  for (double p : request.top_p.entries) request.filters |= p < 1.0;
  for (float p : request.min_p.entries) request.filters |= p > 0.0f;

  return request;
}

// Without `model_logprobs` none are asked for.
void draw(Request& request, Tensor& tokens, Tensor& logprobs, Tensor& valid, Tensor* model_logprobs) {
  request.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  request.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  request.valid = static_cast<bool*>(valid.mutable_data_ptr());
  if (model_logprobs) request.token_model_logprobs = static_cast<float*>(model_logprobs->mutable_data_ptr());
  run(request);
}

void sample_out(const std::vector<Tensor>& tensors, const std::vector<int64_t>& integers,
                const std::vector<double>& numbers, const std::string& divergence, Tensor tokens, Tensor logprobs,
                Tensor valid, std::optional<Tensor> model_logprobs, std::optional<Tensor> /*workspace*/) {
  Packed packed(tensors, integers, numbers);
  Request request = drawing(packed, divergence);
  if (request.model_logprobs && !model_logprobs)
    throw std::runtime_error("mod_fused: model_logprobs are asked for and have no output");
  draw(request, tokens, logprobs, valid, model_logprobs ? &*model_logprobs : nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(const std::vector<Tensor>& tensors,
                                                  const std::vector<int64_t>& integers,
                                                  const std::vector<double>& numbers, const std::string& divergence) {
  Packed packed(tensors, integers, numbers);
  Request request = drawing(packed, divergence);
  Tensor tokens = empty({request.rows}, ScalarType::Long);
  Tensor logprobs = empty({request.rows}, ScalarType::Float);
  Tensor valid = empty({request.rows}, ScalarType::Bool);
  Tensor model_logprobs = empty({request.rows, request.model_logprobs ? request.models : 0}, ScalarType::Float);
  draw(request, tokens, logprobs, valid, &model_logprobs);
  return {tokens, logprobs, valid, model_logprobs};
}

// One function of a divergence over a float32 vector: what pins csrc/divergence.h to mod_fused/divergence.py in the tests.
template <class D> void apply(const D& d, const std::string& function, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = function == "deficit" ? d.deficit(x[i]) : function == "log_ratio" ? d.log_ratio(x[i]) : d.log_slope(x[i]);
}

Tensor divergence_function(const std::string& divergence, const std::string& function, const Tensor& x) {
  Tensor y = empty({x.size(0)}, ScalarType::Float);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t n = x.size(0);
  if (divergence == "forward_kl") apply(ForwardKL(), function, from, to, n);
  else if (divergence == "jsd") apply(JensenShannon(), function, from, to, n);
  else if (divergence == "jeffrey") apply(Jeffrey(), function, from, to, n);
  else {
    const double alpha = std::stod(divergence.substr(divergence.find(':') + 1));
    if (alpha < kSmallAlpha) apply(SmallAlpha(alpha), function, from, to, n);
    else apply(Alpha<false>(alpha), function, from, to, n);
  }
  return y;
}

std::string instruction_set() { return tile_loops().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mod_fused, CPU, library) {
  library.impl("log_probs_cpu", TORCH_BOX(&log_probs));
  library.impl("log_probs_cpu_out", TORCH_BOX(&log_probs_out));
  library.impl("sample_cpu", TORCH_BOX(&sample));
  library.impl("sample_cpu_out", TORCH_BOX(&sample_out));
  library.impl("divergence_cpu", TORCH_BOX(&divergence_function));
}

STABLE_TORCH_LIBRARY_IMPL(mod_fused, CompositeExplicitAutograd, library) {
  library.impl("instruction_set_cpu", TORCH_BOX(&instruction_set));
}

// An empty module: importing it registers the ops.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
