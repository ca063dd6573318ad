// What the tests set in the emulation.
#include "cuda/compat.h"

// 0 forward, 1 reverse, 2 random: the order in which blocks, and the threads of a block, have their turn.
extern "C" void megagnn_emulation_set_order(int order, uint64_t seed) {
  megagnn::emulation::state.order = megagnn::emulation::Order(order);
  megagnn::emulation::state.random.seed(seed);
}
