// The CPU backend as torch ops, on the stable ABI: makes a Request of tensors and numbers. Python has checked shapes, dtypes
// and devices (mod_fused/call/checks.py) and packed the arguments (mod_fused/dispatch/packing.py). No string crosses the
// dispatcher: the ABI's headers before torch 2.14 leak its memory.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
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

// A parameter: the number, or the tensor's entries, one per row, if it is given.
template <class T, class Host> PerRow<T> per_row(Host host, Pointer tensor) {
  PerRow<T> result;
  if (!tensor) result.entries.push_back((T)host);
  else
    for (int64_t b = 0; b < tensor->size(0); ++b) result.entries.push_back(number<T>(*tensor, b * tensor->stride(0)));
  return result;
}

[[noreturn]] void not_packed() {
  throw std::runtime_error("mod_fused: the arguments are not what mod_fused/call/arguments.py packs");
}

// The arguments of an op in their slots; see `pack` of mod_fused/dispatch/packing.py.
struct Packed {
  const std::vector<Tensor>& logits;
  const std::vector<std::optional<Tensor>>& tensors;
  const std::vector<int64_t>& integers;
  const std::vector<double>& numbers;

  Pointer tensor(int slot) const { return tensors[slot] ? &*tensors[slot] : nullptr; }
};

// Slots of the mixture, then those of the draw.
enum TensorSlot { kWeights, kValues, kValueIds, kValueWeights, kPrefix, kOwnPrefix, kPlausibilities, kMixtureTensors,
                  kMask = kMixtureTensors, kBias, kTemperatures, kTopKs, kTopPs, kMinPs, kSeeds, kPositions, kDrawTensors };
enum IntegerSlot { kReference, kVocab, kPlausibilityTensor, kExact, kDivergence, kMixtureIntegers,
                   kTopK = kMixtureIntegers, kSeed, kPosition, kModelLogprobs, kProposalLogprobs, kDrawIntegers };
enum NumberSlot { kPlausibility, kAlpha, kMixtureNumbers, kTemperature = kMixtureNumbers, kTopP, kMinP, kDrawNumbers };

// An uninitialised contiguous CPU tensor, straight from the allocator: a tenth of the time of calling aten::empty.
Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  const int64_t strides[2] = {sizes.size() == 2 ? std::max<int64_t>(sizes[1], 1) : 1, 1};
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Takes numbers one after the other.
class Numbers {
 public:
  Numbers(const std::vector<double>& from, size_t next) : from_(from), next_(next) {}

  const double* take(int64_t count) {
    if ((uint64_t)count > left()) not_packed();
    next_ += (size_t)count;
    return from_.data() + next_ - (size_t)count;
  }
  size_t left() const { return from_.size() - next_; }

 private:
  const std::vector<double>& from_;
  size_t next_;
};

// Weights: the next `width` numbers, or the tensor's entries if it is given.
PerRowVector weights_of(Numbers& numbers, Pointer tensor, int width) {
  PerRowVector result{{}, width};
  if (!tensor) {
    const double* first = numbers.take(width);
    result.entries.assign(first, first + width);
    return result;
  }
  const bool matrix = tensor->dim() == 2;
  for (int64_t b = 0; b < (matrix ? tensor->size(0) : 1); ++b)
    for (int i = 0; i < width; ++i)
      result.entries.push_back(matrix ? number<double>(*tensor, b * tensor->stride(0) + i * tensor->stride(1))
                                      : number<double>(*tensor, i * tensor->stride(0)));
  return result;
}

// Reads the tensors of values, candidates and prefixes.
void add_tensors(const Packed& packed, Request& request) {
  if (const Pointer values = packed.tensor(kValues)) {
    const int count = (int)values->size(0);
    const int64_t step = values->stride(0) * (int64_t)values->element_size();
    for (int j = 0; j < count; ++j)
      request.values.push_back({bytes(*values) + j * step, dtype_of(*values),
                                values->stride(1) * (int64_t)values->element_size()});
  }
  if (const Pointer ids = packed.tensor(kValueIds)) {
    request.value_ids = static_cast<const int64_t*>(ids->const_data_ptr());
    request.candidates = ids->size(1);
    request.value_ids_row = ids->stride(0);
    request.value_ids_column = ids->stride(1);
  }
  if (const Pointer prefix = packed.tensor(kPrefix))
    for (int64_t b = 0; b < request.rows; ++b)
      for (int i = 0; i < request.models; ++i)
        request.prefix.push_back(number<double>(*prefix, b * prefix->stride(0) + i * prefix->stride(1)));
  if (const Pointer own = packed.tensor(kOwnPrefix))
    for (int64_t b = 0; b < request.rows; ++b) request.own_prefix.push_back(number<double>(*own, b * own->stride(0)));
}

// The part of a request that all ops have; the tensors must outlive it.
Request mixture(const Packed& packed, bool draws) {
  const std::vector<int64_t>& integers = packed.integers;
  Numbers numbers(packed.numbers, draws ? kDrawNumbers : kMixtureNumbers);
  if (packed.tensors.size() != (draws ? kDrawTensors : kMixtureTensors) ||
      integers.size() != (draws ? kDrawIntegers : kMixtureIntegers) || packed.logits.empty() ||
      packed.logits.size() > kMaxModels || packed.numbers.size() < (draws ? kDrawNumbers : kMixtureNumbers))
    not_packed();

  Request request;
  request.reference = integers[kReference] != 0;
  request.vocab = integers[kVocab];
  request.exact = integers[kExact] != 0;
  request.divergence = integers[kDivergence];
  request.alpha = packed.numbers[kAlpha];
  if (!request.log_linear() && !Divergences::visit(request.divergence, request.alpha, [](const auto&) {})) not_packed();
  for (const Tensor& x : packed.logits) request.logits[request.models++] = rows_of(x);
  request.rows = packed.logits[0].size(0);
  add_tensors(packed, request);
  const int policies = request.models - (request.reference ? 1 : 0);
  const Pointer weights = packed.tensor(kWeights);
  request.weights = weights_of(numbers, weights, policies);
  if (weights && weights->scalar_type() == ScalarType::Float) request.weight_rounding = (policies + 1) * 0x1p-24;
  request.value_weights = weights_of(numbers, packed.tensor(kValueWeights), (int)request.values.size());
  const bool scaled = numbers.left() != 0;
  for (int i = 0; i < request.models; ++i) request.scales[i] = scaled ? (float)*numbers.take(1) : 1.0f;
  if (numbers.left() != 0) not_packed();
  const Pointer shares = packed.tensor(kPlausibilities);
  if (shares || packed.numbers[kPlausibility] > 0.0) {
    request.plausibility = per_row<double>(packed.numbers[kPlausibility], shares);
    request.plausibility_model = (int)integers[kPlausibilityTensor] - (request.reference ? 0 : 1);
  }
  return request;
}

void log_probs_out(const std::vector<Tensor>& logits, const std::vector<std::optional<Tensor>>& tensors,
                   const std::vector<int64_t>& integers, const std::vector<double>& numbers, Tensor out,
                   std::optional<Tensor> /*workspace*/) {
  Request request = mixture({logits, tensors, integers, numbers}, false);
  request.log_probs = static_cast<float*>(out.mutable_data_ptr());
  run(request);
}

Tensor log_probs(const std::vector<Tensor>& logits, const std::vector<std::optional<Tensor>>& tensors,
                 const std::vector<int64_t>& integers, const std::vector<double>& numbers) {
  Request request = mixture({logits, tensors, integers, numbers}, false);
  Tensor out = empty({request.rows, request.vocab}, ScalarType::Float);
  request.log_probs = static_cast<float*>(out.mutable_data_ptr());
  run(request);
  return out;
}

// A request for a draw, without its outputs.
Request drawing(const Packed& packed) {
  Request request = mixture(packed, true);
  request.temperature = per_row<float>(packed.numbers[kTemperature], packed.tensor(kTemperatures));
  request.top_k = per_row<int64_t>(packed.integers[kTopK], packed.tensor(kTopKs));
  request.top_p = per_row<double>(packed.numbers[kTopP], packed.tensor(kTopPs));
  request.min_p = per_row<float>(packed.numbers[kMinP], packed.tensor(kMinPs));
  request.position = per_row<int64_t>(packed.integers[kPosition], packed.tensor(kPositions));
  if (const Pointer mask = packed.tensor(kMask)) {
    const int64_t size = (int64_t)mask->element_size();
    request.mask = {bytes(*mask), mask->scalar_type() == ScalarType::Int, mask->stride(0) * size,
                    mask->stride(1) * size};
  }
  request.model_logprobs = packed.integers[kModelLogprobs] != 0;
  request.proposal_logprobs = packed.integers[kProposalLogprobs] != 0;

  if (const Pointer seeds = packed.tensor(kSeeds)) {
    request.seeds = per_row<uint64_t>(0, seeds);
  } else {
    for (int64_t b = 0; b < request.rows; ++b)
      request.seeds.entries.push_back(split_mix((uint64_t)packed.integers[kSeed] + (uint64_t)b));
  }
  if (const Pointer bias = packed.tensor(kBias)) request.bias = rows_of(*bias);
  request.filters = request.mask.data != nullptr || request.bias.data != nullptr;
  for (int64_t k : request.top_k.entries) request.filters |= k > 0;
  for (double p : request.top_p.entries) request.filters |= p < 1.0;
  for (float p : request.min_p.entries) request.filters |= p > 0.0f;

  return request;
}

// Null pointers are of outputs that are not asked for.
void draw(Request& request, Tensor& tokens, Tensor& logprobs, Tensor& valid, Tensor* model_logprobs,
          Tensor* proposal_logprobs) {
  request.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  request.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  request.valid = static_cast<bool*>(valid.mutable_data_ptr());
  if (model_logprobs) request.token_model_logprobs = static_cast<float*>(model_logprobs->mutable_data_ptr());
  if (proposal_logprobs) request.token_proposal_logprobs = static_cast<float*>(proposal_logprobs->mutable_data_ptr());
  run(request);
}

void sample_out(const std::vector<Tensor>& logits, const std::vector<std::optional<Tensor>>& tensors,
                const std::vector<int64_t>& integers, const std::vector<double>& numbers, Tensor tokens, Tensor logprobs,
                Tensor valid, std::optional<Tensor> model_logprobs, std::optional<Tensor> proposal_logprobs,
                std::optional<Tensor> /*workspace*/) {
  Request request = drawing({logits, tensors, integers, numbers});
  if ((request.model_logprobs && !model_logprobs) || (request.proposal_logprobs && !proposal_logprobs))
    throw std::runtime_error("mod_fused: log-probabilities are asked for and have no output");
  draw(request, tokens, logprobs, valid, model_logprobs ? &*model_logprobs : nullptr,
       proposal_logprobs ? &*proposal_logprobs : nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample(const std::vector<Tensor>& logits,
                                                  const std::vector<std::optional<Tensor>>& tensors,
                                                  const std::vector<int64_t>& integers,
                                                  const std::vector<double>& numbers) {
  Request request = drawing({logits, tensors, integers, numbers});
  if (request.proposal_logprobs) not_packed();  // only `sample_out` has them
  Tensor tokens = empty({request.rows}, ScalarType::Long);
  Tensor logprobs = empty({request.rows}, ScalarType::Float);
  Tensor valid = empty({request.rows}, ScalarType::Bool);
  Tensor model_logprobs = empty({request.rows, request.model_logprobs ? request.models : 0}, ScalarType::Float);
  draw(request, tokens, logprobs, valid, &model_logprobs, nullptr);
  return {tokens, logprobs, valid, model_logprobs};
}

// One function of a divergence (0: deficit, 1: log_ratio, 2: log_slope) over a float32 vector. The tests compare
// csrc/divergence.h with mod_fused/divergence.py by it.
template <class D> void apply(const D& d, int64_t function, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = function == 0 ? d.deficit(x[i]) : function == 1 ? d.log_ratio(x[i]) : d.log_slope(x[i]);
}

Tensor divergence_function(int64_t divergence, double alpha, int64_t function, const Tensor& x) {
  Tensor y = empty({x.size(0)}, ScalarType::Float);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t n = x.size(0);
  if (!Divergences::visit(divergence, alpha, [&](const auto& d) { apply(d, function, from, to, n); })) not_packed();
  return y;
}

// The place of the instruction set in the list of mod_fused/dispatch/backends.py.
int64_t instruction_set() {
  const char* const names[] = {"baseline", "neon", "avx2", "avx512"};
  int64_t i = 0;
  while (std::strcmp(names[i], tile_loops().name) != 0) ++i;
  return i;
}

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
