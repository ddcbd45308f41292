// Which instruction set the ops run on: chosen once per process, the best that the CPU has and the environment allows.
#pragma once
#include <string>
#include <vector>

#include "arguments.h"

namespace nunchaku_py::cpu {

// GOP/s of one thread from registers (0: no such instruction), a multiplication and an addition counting as two, by
// what is multiplied.
struct Peak {
  double int8, bf16, fp32;
};

// The ops, compiled for one instruction set.
struct Engine {
  void (*quantize_act)(const QuantizeArguments&);
  void (*linear)(const LinearArguments&);
  void (*row_scales)(const LinearArguments&);  // to y (n) fp32: the INT8 scale that each row of weights folds to
  Peak (*peak)();
  void (*sweep)(const SweepArguments&);
  void (*round_rows)(const RoundArguments&);
};

struct Isa {
  const char* name;
  const Engine* engine;  // nullptr: not compiled into this build
  std::string obstacle;  // why this process cannot use it; empty if it can
};

// The best first. "portable" is always there; what stands behind it is used only where it is asked for.
const std::vector<Isa>& isas();

// The one in use: the best without an obstacle, or the one NUNCHAKU_PY_CPU_ISA names. Throws std::runtime_error, in a
// sentence, where that one does not exist or cannot be used.
const Isa& current_isa();

}  // namespace nunchaku_py::cpu
