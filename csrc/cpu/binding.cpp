// The CPU backend as torch ops, on the stable ABI: tensors and lists in, a Request out. The Python side has checked shapes,
// dtypes and devices (mod_fused/checks.py); the order of arguments is that of mod_fused/arguments.py.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../divergence.h"
#include "../philox.h"
#include "request.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
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

template <class T, class Host> PerRow<T> per_row(const std::vector<Host>& host, const OptionalTensor& tensor) {
  PerRow<T> result;
  if (tensor) {
    for (int64_t b = 0; b < tensor->size(0); ++b) result.entries.push_back(number<T>(*tensor, b * tensor->stride(0)));
    if (result.entries.empty()) result.entries.push_back(T());
  } else {
    result.entries.assign(host.begin(), host.end());
  }
  return result;
}

PerRowVector per_row_vector(std::vector<double> host, const OptionalTensor& tensor, int width) {
  if (!tensor) return {std::move(host), width};
  std::vector<double> entries;
  const bool matrix = tensor->dim() == 2;
  for (int64_t b = 0; b < (matrix ? tensor->size(0) : 1); ++b)
    for (int i = 0; i < width; ++i)
      entries.push_back(matrix ? number<double>(*tensor, b * tensor->stride(0) + i * tensor->stride(1))
                               : number<double>(*tensor, i * tensor->stride(0)));
  return {std::move(entries), width};
}

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
Request mixture(const OptionalTensor& ref_logits, const std::vector<Tensor>& policy_logits, std::vector<double> weights,
                const OptionalTensor& weights_tensor, const std::string& divergence, const std::string& normalizer,
                const OptionalTensor& values, const OptionalTensor& value_ids, std::vector<double> value_weights,
                const OptionalTensor& value_weights_tensor, const OptionalTensor& prefix_logprobs,
                const std::vector<double>& logit_scales, int64_t vocab_size, double plausibility,
                int64_t plausibility_tensor) {
  Request request;
  const Tensor& like = ref_logits ? *ref_logits : policy_logits[0];
  request.rows = like.size(0);
  request.vocab = vocab_size;
  request.reference = ref_logits.has_value();
  if (ref_logits) request.logits[request.models++] = rows_of(*ref_logits);
  for (const Tensor& x : policy_logits) request.logits[request.models++] = rows_of(x);
  for (int i = 0; i < request.models; ++i) request.scales[i] = logit_scales.empty() ? 1.0f : (float)logit_scales[i];
  request.weights = per_row_vector(std::move(weights), weights_tensor, (int)policy_logits.size());

  request.kind = divergence == "reverse_kl"   ? Kind::reverse_kl
                 : divergence == "forward_kl" ? Kind::forward_kl
                 : divergence == "jsd"        ? Kind::jsd
                 : divergence == "jeffrey"    ? Kind::jeffrey
                                              : Kind::alpha;
  if (request.kind == Kind::alpha) request.alpha = std::stod(divergence.substr(divergence.find(':') + 1));
  request.exact = normalizer == "exact";

  if (values) {
    const int count = (int)values->size(0);
    const int64_t step = values->stride(0) * (int64_t)values->element_size();
    for (int j = 0; j < count; ++j)
      request.values.push_back({bytes(*values) + j * step, dtype_of(*values),
                                values->stride(1) * (int64_t)values->element_size()});
    request.value_weights = per_row_vector(std::move(value_weights), value_weights_tensor, count);
  }
  if (value_ids) {
    request.value_ids = static_cast<const int64_t*>(value_ids->const_data_ptr());
    request.candidates = value_ids->size(1);
    request.value_ids_row = value_ids->stride(0);
    request.value_ids_column = value_ids->stride(1);
  }
  if (prefix_logprobs)
    for (int64_t b = 0; b < request.rows; ++b)
      for (int i = 0; i < request.models; ++i)
        request.prefix.push_back(
            number<double>(*prefix_logprobs, b * prefix_logprobs->stride(0) + i * prefix_logprobs->stride(1)));
  if (plausibility > 0.0) {
    request.log_plausibility = (float)std::log(plausibility);
    request.plausibility_model = (int)plausibility_tensor - (request.reference ? 0 : 1);
  }
  return request;
}

Tensor log_probs(const OptionalTensor& ref_logits, const std::vector<Tensor>& policy_logits,
                 const std::vector<double>& weights, const OptionalTensor& weights_tensor,
                 const std::string& divergence, const std::string& normalizer, const OptionalTensor& values,
                 const OptionalTensor& value_ids, const std::vector<double>& value_weights,
                 const OptionalTensor& value_weights_tensor, const OptionalTensor& prefix_logprobs,
                 const std::vector<double>& logit_scales, int64_t vocab_size, double plausibility,
                 int64_t plausibility_tensor) {
  Request request = mixture(ref_logits, policy_logits, weights, weights_tensor, divergence, normalizer, values,
                            value_ids, value_weights, value_weights_tensor, prefix_logprobs, logit_scales, vocab_size,
                            plausibility, plausibility_tensor);
  Tensor out = empty({request.rows, request.vocab}, ScalarType::Float);
  request.log_probs = static_cast<float*>(out.mutable_data_ptr());
  run(request);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(
    const OptionalTensor& ref_logits, const std::vector<Tensor>& policy_logits, const std::vector<double>& weights,
    const OptionalTensor& weights_tensor, const std::string& divergence, const std::string& normalizer,
    const OptionalTensor& values, const OptionalTensor& value_ids, const std::vector<double>& value_weights,
    const OptionalTensor& value_weights_tensor, const OptionalTensor& prefix_logprobs,
    const std::vector<double>& logit_scales, int64_t vocab_size, double plausibility, int64_t plausibility_tensor,
    const std::vector<double>& temperature, const OptionalTensor& temperature_tensor,
    const std::vector<int64_t>& top_k, const OptionalTensor& top_k_tensor, const std::vector<double>& top_p,
    const OptionalTensor& top_p_tensor, const std::vector<double>& min_p, const OptionalTensor& min_p_tensor,
    const OptionalTensor& mask, int64_t seed, const OptionalTensor& seed_tensor, const std::vector<int64_t>& position,
    const OptionalTensor& position_tensor, bool return_model_logprobs) {
  Request request = mixture(ref_logits, policy_logits, weights, weights_tensor, divergence, normalizer, values,
                            value_ids, value_weights, value_weights_tensor, prefix_logprobs, logit_scales, vocab_size,
                            plausibility, plausibility_tensor);
  request.temperature = per_row<float>(temperature, temperature_tensor);
  request.top_k = per_row<int64_t>(top_k, top_k_tensor);
  request.top_p = per_row<double>(top_p, top_p_tensor);
  request.min_p = per_row<float>(min_p, min_p_tensor);
  request.position = per_row<int64_t>(position, position_tensor);
  request.seeds = per_row<uint64_t>(std::vector<int64_t>(), seed_tensor);
  for (int64_t b = 0; b < request.rows && !seed_tensor; ++b)
    request.seeds.entries.push_back(split_mix((uint64_t)seed + (uint64_t)b));
  if (mask) {
    const int64_t size = (int64_t)mask->element_size();
    request.mask = {bytes(*mask), mask->scalar_type() == ScalarType::Int, mask->stride(0) * size,
                    mask->stride(1) * size};
  }
  request.filters = mask.has_value();
  for (int64_t k : request.top_k.entries) request.filters |= k > 0;
  for (double p : request.top_p.entries) request.filters |= p < 1.0;
  for (float p : request.min_p.entries) request.filters |= p > 0.0f;
  request.model_logprobs = return_model_logprobs;

  const int64_t columns = return_model_logprobs ? request.models : 0;
  Tensor tokens = empty({request.rows}, ScalarType::Long);
  Tensor logprobs = empty({request.rows}, ScalarType::Float);
  Tensor valid = empty({request.rows}, ScalarType::Bool);
  Tensor model_logprobs = empty({request.rows, columns}, ScalarType::Float);
  request.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  request.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  request.valid = static_cast<bool*>(valid.mutable_data_ptr());
  request.token_model_logprobs = static_cast<float*>(model_logprobs.mutable_data_ptr());
  run(request);
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
  else apply(Alpha<false>(std::stod(divergence.substr(divergence.find(':') + 1))), function, from, to, n);
  return y;
}

std::string instruction_set() { return tile_loops().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mod_fused, CPU, library) {
  library.impl("log_probs_cpu", TORCH_BOX(&log_probs));
  library.impl("sample_cpu", TORCH_BOX(&sample));
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
