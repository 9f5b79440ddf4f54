#include "op/onnxruntime/op_kernel.h"

namespace chai::ort {
namespace {

namespace own = schema::clustered_head_attention;
namespace shared = schema::shared_clustered_head_attention;

// The attribute must say what the type of the cache says: bytes could be codes of either width.
void expect_bits(const char* op, const char* attribute, std::int64_t bits, Storage storage, Storage element) {
  const bool fits = storage == Storage::kInt8      ? bits == 8
                    : storage == Storage::kInt4    ? bits == 4
                    : storage == Storage::kFloat16 ? bits == 16 || (bits == 0 && element == Storage::kFloat16)
                                                   : bits == 0 && storage == element;
  if (!fits) {
    refuse(op, std::string(attribute) + " is " + std::to_string(bits) +
                   ", which is not what the type of the cache says");
  }
}

template <std::size_t INPUTS, std::size_t OUTPUTS>
constexpr Signature make(const char* op, const schema::Parameter (&inputs)[INPUTS],
                         const schema::Parameter (&outputs)[OUTPUTS], bool shared) {
  return {op, inputs, INPUTS, outputs, OUTPUTS, shared};
}

}  // namespace

const Signature kOwn = make(own::kOpType, own::kInputs, own::kOutputs, false);
const Signature kShared = make(shared::kOpType, shared::kInputs, shared::kOutputs, true);

own::Attributes read_attributes(const OrtKernelInfo* info, const char* op, Storage storage, Storage keys,
                                Storage values) {
  own::Attributes attributes;
  read(info, "scale", &attributes.scale);
  read(info, "probe_tokens", &attributes.probe_tokens);
  read(info, "online", &attributes.online);
  read(info, "key_bits", &attributes.key_bits);
  read(info, "value_bits", &attributes.value_bits);
  read(info, "group", &attributes.group);
  read(info, "window", &attributes.window);
  read(info, "softcap", &attributes.softcap);
  expect_bits(op, "key_bits", attributes.key_bits, keys, storage);
  expect_bits(op, "value_bits", attributes.value_bits, values, storage);
  return attributes;
}

OpKernel::OpKernel(const OrtKernelInfo* info, Storage storage, Storage keys, Storage values,
                   const Signature& signature)
    : signature_(signature) {
  const own::Attributes attributes = read_attributes(info, signature.op, storage, keys, values);
  call_.storage = storage;
  call_.scale = attributes.scale;
  call_.probe_tokens = attributes.probe_tokens;
  call_.online = attributes.online != 0;
  call_.keys.storage = keys;
  call_.values.storage = values;
  call_.group = attributes.group;
  call_.window = attributes.window;
  call_.softcap = attributes.softcap;
  std::string error;
  if (!choose_isa(&isa_, &error)) refuse(signature_.op, error);
}

void OpKernel::expect(std::size_t index, const Tensor& tensor, const Dims& dims) const {
  if (tensor && tensor.dims != dims) {
    refuse(signature_.op, std::string(signature_.inputs[index].name) + " is " + text(tensor.dims) +
                              ", expected " + text(dims));
  }
}

OpKernel::Cache OpKernel::cache(const OrtKernelContext* context, std::size_t at, std::size_t scales_at,
                                std::int64_t heads, std::int64_t dim, const AttentionCall& call,
                                const Pool& pool) const {
  Cache cache{at, scales_at, in(context, at), in(context, scales_at)};
  const AttentionShape& s = call.shape;
  const std::int64_t columns = pool.storage == Storage::kInt4 ? dim / 2 : dim;
  expect(at, cache.rows, {s.pages, heads, s.page_size, columns});
  if (static_cast<bool>(cache.scales) != quantised(pool.storage)) {
    refuse(signature_.op, std::string(signature_.inputs[scales_at].name) +
                              (cache.scales ? " is given for a cache without scales" : " is missing"));
  }
  if (cache.scales && call.group > 0 && dim % call.group == 0) {
    expect(scales_at, cache.scales, {s.pages, heads, s.page_size, row_scales(pool.storage, dim, call.group)});
  }
  return cache;
}

void OpKernel::bind(OrtKernelContext* context, const Cache& cache, std::size_t output_at,
                    std::size_t scales_output_at, Pool* pool) const {
  pool->past = cache.rows.data;
  pool->past_scales = cache.scales.data;
  if (signature_.shared) {  // only read
    pool->present = const_cast<void*>(cache.rows.data);
    pool->present_scales = const_cast<void*>(cache.scales.data);
    return;
  }
  pool->present = out(context, output_at, cache.rows.dims);
  if (cache.scales) pool->present_scales = out(context, scales_output_at, cache.scales.dims);
}

void OpKernel::compute(OrtKernelContext* context) const {
  // Up to the page table both ops have the same inputs.
  const bool is_shared = signature_.shared;
  const auto at = [&](std::size_t own_index, std::size_t shared_index) {
    return is_shared ? shared_index : own_index;
  };
  const std::size_t map_at = at(own::kPastHeadMap, shared::kPastHeadMap);
  const std::size_t past_at = at(own::kPastLengths, shared::kPastLengths);
  const std::size_t lengths_at = at(own::kLengths, shared::kLengths);
  const std::size_t sinks_at = at(own::kSinks, shared::kSinks);
  const std::size_t slopes_at = at(own::kAlibiSlopes, shared::kAlibiSlopes);
  const Tensor query = in(context, own::kQuery), key = in(context, own::kKey),
               value = in(context, own::kValue);
  const Tensor page_table = in(context, own::kPageTable), past_head_map = in(context, map_at);
  const Tensor past_lengths = in(context, past_at), lengths = in(context, lengths_at);
  const Tensor sinks = in(context, sinks_at), slopes = in(context, slopes_at);
  const Tensor pool = in(context, own::kKeyCache);

  AttentionCall call = call_;
  AttentionShape& s = call.shape;
  s.batch = query.dims[0];
  s.heads = query.dims[1];
  s.tokens = query.dims[2];
  s.key_dim = query.dims[3];
  s.kv_heads = key.dims[1];
  s.value_dim = value.dims[3];
  s.pages = pool.dims[0];
  s.kept = pool.dims[1];
  s.page_size = pool.dims[2];
  s.entries = page_table.dims[1];
  expect(own::kKey, key, {s.batch, s.kv_heads, s.tokens, s.key_dim});
  expect(own::kValue, value, {s.batch, s.kv_heads, s.tokens, s.value_dim});
  const Cache keys = cache(context, own::kKeyCache, own::kKeyScales, s.kept, s.key_dim, call, call.keys);
  const Cache values =
      cache(context, own::kValueCache, own::kValueScales, s.kv_heads, s.value_dim, call, call.values);
  expect(own::kPageTable, page_table, {s.batch, s.entries});
  expect(map_at, past_head_map, {s.batch, s.heads});
  expect(past_at, past_lengths, {s.batch});
  expect(lengths_at, lengths, {s.batch});
  expect(sinks_at, sinks, {s.heads});
  expect(slopes_at, slopes, {s.heads});

  call.query = query.data;
  call.key = key.data;
  call.value = value.data;
  call.page_table = page_table.integers();
  call.past_head_map = past_head_map.integers();
  call.past_lengths = past_lengths.integers();
  call.lengths = lengths.integers();
  call.sinks = sinks.data;
  call.slopes = static_cast<const float*>(slopes.data);
  if (is_shared) {
    const Tensor kept_head_map = in(context, shared::kKeptHeadMap);
    expect(shared::kKeptHeadMap, kept_head_map, {s.batch, s.heads});
    call.kept_head_map = kept_head_map.integers();
  }
  const std::string problem = check(call);
  if (!problem.empty()) refuse(signature_.op, problem);
  bind(context, keys, own::kPresentKeyCache, own::kPresentKeyScales, &call.keys);
  bind(context, values, own::kPresentValueCache, own::kPresentValueScales, &call.values);
  call.output = out(context, own::kOutput, {s.batch, s.tokens, s.heads * s.value_dim});
  const std::size_t map_output = at(own::kPresentHeadMap, shared::kPresentHeadMap);
  call.present_head_map = static_cast<std::int32_t*>(out(context, map_output, {s.batch, s.heads}));
  attend(call, isa_, executor(context));
}

}  // namespace chai::ort
