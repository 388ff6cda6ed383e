// What the ops of the encoder and those of a whole model share.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "cpu/encoder.h"
#include "cpu/ragged_batch.h"
#include "ops_common.h"

namespace packedbert {

// Things that Python holds by a number. To be made with `new` and never destroyed: at the end of a process
// nobody knows whether torch, whose tensors they hold, is still there.
template <typename Value>
class Registry {
 public:
  int64_t add(std::shared_ptr<const Value> value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    values_.emplace(++last_key_, std::move(value));
    return last_key_;
  }
  // Null where there is none.
  std::shared_ptr<const Value> find(int64_t key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(key);
    return found == values_.end() ? nullptr : found->second;
  }
  void release(int64_t key) {
    std::shared_ptr<const Value> value;  // destroyed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(key);
    if (found == values_.end()) return;
    value = std::move(found->second);
    values_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Value>> values_;
  // Keys begin anywhere, so that one of another process is not found here.
  int64_t last_key_ = static_cast<int64_t>(std::random_device{}()) << 20;
};

// The weights of an encoder, checked, and what else does not change from call to call.
struct EncoderWeights {
  std::vector<Tensor> tensors;  // own what `layers` points to
  std::vector<cpu::EncoderLayer> layers;
  int64_t hidden_size;
  Activation activation;
  Norm norm;
  float eps;
};

// Fails where there is no encoder of that key.
std::shared_ptr<const EncoderWeights> find_encoder(const char* op, int64_t key);

// The real tokens of a padded batch [sequences, length].
struct RealTokens {
  cpu::RaggedBatch batch;
  std::vector<int64_t> rows;  // of each token in the padded batch

  // mask: [sequences, length], true or (where `numbers` are allowed) not 0 for real tokens; none: all are.
  RealTokens(const char* op,
             const std::optional<Tensor>& mask,
             int64_t sequences,
             int64_t length,
             bool numbers = false);
  bool are_all() const { return static_cast<int64_t>(rows.size()) == padded_; }

 private:
  int64_t padded_;
};

// input, output: [sequences * length, hidden_size]; rows that belong to no token are left alone. They may be
// the same.
void run_encoder(const EncoderWeights& weights, const RealTokens& tokens, const float* input, float* output);

}  // namespace packedbert
