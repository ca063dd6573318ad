#include "cuda/compat.h"

extern "C" const char* megagnn_cuda_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }
