#include "op/onnxruntime/kernel_v1.h"

#include <numeric>

namespace chai::ort {
namespace {

namespace own = schema::clustered_head_attention_v1;
namespace shared = schema::shared_clustered_head_attention_v1;

void* writable(const Tensor& tensor) {
  return const_cast<void*>(tensor.data);
}

}  // namespace

void KernelV1::compute(OrtKernelContext* context) const {
  // Both ops have the query and the key first, and the map and the lengths last.
  const bool is_shared = signature_.shared;
  const std::size_t key_cache_at = is_shared ? shared::kKeyCache : own::kPastKey;
  const std::size_t value_cache_at = is_shared ? shared::kValueCache : own::kPastValue;
  const Tensor query = in(context, own::kQuery), key = in(context, own::kKey);
  const Tensor key_cache = in(context, key_cache_at), value_cache = in(context, value_cache_at);
  const Tensor past_head_map = in(context, own::kPastHeadMap);
  const Tensor past_lengths = in(context, own::kPastLengths), lengths = in(context, own::kLengths);

  AttentionCall call = call_;
  AttentionShape& s = call.shape;
  s.batch = query.dims[0];
  s.heads = query.dims[1];
  s.tokens = query.dims[2];
  s.key_dim = query.dims[3];
  s.kv_heads = key.dims[1];
  s.value_dim = value_cache.dims[3];
  s.kept = key_cache.dims[1];
  s.pages = s.batch;
  s.page_size = key_cache.dims[2];
  s.entries = 1;
  if (!is_shared) {
    const Tensor value = in(context, own::kValue);
    s.value_dim = value.dims[3];
    expect(own::kValue, value, {s.batch, s.kv_heads, s.tokens, s.value_dim});
    call.value = value.data;
    call.value_tokens = s.tokens;
  }
  expect(own::kKey, key, {s.batch, s.kv_heads, s.tokens, s.key_dim});
  expect(key_cache_at, key_cache, {s.batch, s.kept, s.page_size, s.key_dim});
  expect(value_cache_at, value_cache, {s.batch, s.kv_heads, s.page_size, s.value_dim});
  expect(own::kPastHeadMap, past_head_map, {s.batch, s.heads});
  expect(own::kPastLengths, past_lengths, {s.batch});
  expect(own::kLengths, lengths, {s.batch});

  std::vector<std::int32_t> table(s.batch);
  std::iota(table.begin(), table.end(), 0);
  call.page_table = table.data();
  call.query = query.data;
  call.key = key.data;
  call.past_head_map = past_head_map.integers();
  call.past_lengths = past_lengths.integers();
  call.lengths = lengths.integers();
  call.keys.storage = call.values.storage = call.storage;
  if (is_shared) {
    const Tensor kept_head_map = in(context, shared::kKeptHeadMap);
    expect(shared::kKeptHeadMap, kept_head_map, {s.batch, s.heads});
    call.kept_head_map = kept_head_map.integers();
    call.keys.present = writable(key_cache);  // only read
    call.values.present = writable(value_cache);
    // A fresh row's first tokens are the first positions of its cache.
    call.value = value_cache.data;
    call.value_tokens = s.page_size;
    check_call(call);
    return evaluate(context, &call, shared::kPresentHeadMap);
  }
  check_call(call);
  call.keys.past = key_cache.data;
  call.values.past = value_cache.data;
  call.keys.present = out(context, own::kPresentKey, key_cache.dims);
  call.values.present = out(context, own::kPresentValue, value_cache.dims);
  evaluate(context, &call, own::kPresentHeadMap);
}

}  // namespace chai::ort
