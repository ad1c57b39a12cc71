// The ops for one instruction set: compiled once for each, with -DOPS=<name of the table> and that set's flags.
//
// The rule that makes rows independent: every output element is one chain of operations whose order depends on its own
// row only. Reductions run in a fixed tree over lanes and in absolute tiles of TILE keys from the sequence's start, so
// that neither chunking nor company nor placement nor the number of threads can reorder a sum.
#include "attention.h"
#include "elementwise.h"
#include "logits.h"
#include "ops.h"
#include "product.h"

extern const Ops OPS;
const Ops OPS = {rms_norm_any, activate_and_mul_any,    rope_and_store_any, attention_scratch, attention_any,
                 ready_bytes,  bf16_weights::make_ready, product_any,        group_maxima,      at_least,
                 W,            PANEL,                   bf16_weights::INPUTS};
