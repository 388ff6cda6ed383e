// Everything that is written once over Vec and Dot, in the order in which it builds up. Included inside the
// namespace and the target region of one instruction set, after its constants, vec_*.h, dot_*.h and
// products_*.h.

// clang-format off
#include "cpu/linear_body.h"
#include "cpu/packed_linear_body.h"
#include "cpu/embed_body.h"
#include "cpu/head_body.h"
#include "cpu/attention_body.h"
#include "cpu/quantized_attention_body.h"
#include "cpu/pruned_attention_body.h"
#include "cpu/encoder_body.h"
// clang-format on
