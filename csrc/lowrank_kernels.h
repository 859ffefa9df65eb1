// All of the low-rank maths that one instruction set has, included as csrc/clones.h says.

#include "lowrank_panel.h"
#if X86_LEVEL >= 3
#include "lowrank_products.h"
#include "lowrank_columns.h"
#include "lowrank_gram.h"
#include "lowrank_lanczos.h"
#endif
#if X86_LEVEL == 5 && defined(ASSEMBLES_AMX)
#include "lowrank_tiles.h"
#endif
