// The table by which isa.cpp finds the ops of this file's instruction set.
namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {
extern const Engine engine;
const Engine engine{quantize_act, linear, row_scales, peak, sweep, round_rows};
}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
