// All of the divergences that one instruction set has, included as csrc/clones.h says.

#include "divergence_rows.h"
#include "divergence_topk.h"
