// All of the divergences that one instruction set has, included as csrc/clones.h says after csrc/vectors.h: inside a
// namespace, so none of these files includes another.

#include "divergence_blocks.h"
#include "divergence_rows.h"
#include "divergence_topk.h"
