#include "cuda/compat.h"

extern "C" int megagnn_cuda_last_error() { return int(cudaGetLastError()); }
extern "C" const char* megagnn_cuda_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }
