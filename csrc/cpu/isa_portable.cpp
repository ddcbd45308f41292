// The CPU ops in plain C++; see isa_prelude.h.
#include "isa_prelude.h"

#define NUNCHAKU_PY_ISA portable
#include "engine/engine.h"
#include "isa_epilogue.h"
