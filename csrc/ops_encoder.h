// What the Python module needs of the prepared encoders.
#pragma once

#include <cstdint>

namespace packedbert {

// Forgets the encoder that prepare_encoder gave this key; calls in progress finish. An unknown key is
// ignored.
void release_encoder(int64_t key);

}  // namespace packedbert
