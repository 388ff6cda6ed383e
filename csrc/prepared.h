// What the Python module needs of what was prepared: to forget it.
#pragma once

#include <cstdint>

namespace packedbert {

// Forget what prepare_encoder or prepare_bert gave this key for; calls in progress finish. An unknown key is
// ignored.
void release_encoder(int64_t key);
void release_bert(int64_t key);

}  // namespace packedbert
