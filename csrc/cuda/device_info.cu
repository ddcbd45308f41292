// Which of the compiled targets runs on which GPU of this machine, found out by running it: the build's proof.
#include <cuda_runtime.h>

#include <stdexcept>

#include "device_info.h"

namespace nunchaku_py::cuda {
namespace {

__global__ void report_target(int* target) {
#ifdef __CUDA_ARCH__
  *target = __CUDA_ARCH__ / 10;
#endif
}

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

std::string why_no_gpu(cudaError_t error) {
  const std::string driver = error == cudaErrorInsufficientDriver ? why_not_this_driver() : "";
  return driver.empty() ? cudaGetErrorString(error) : driver;
}

// 0, or the target that ran; `problem` then says what the driver said.
int run_report(int device, std::string& problem) {
  int previous = 0, target = 0;
  int* on_device = nullptr;
  cudaGetDevice(&previous);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMalloc(&on_device, sizeof(int));
  if (error == cudaSuccess) {
    report_target<<<1, 1>>>(on_device);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaMemcpy(&target, on_device, sizeof(int), cudaMemcpyDeviceToHost);
  if (error != cudaSuccess) problem = cudaGetErrorString(error);
  cudaFree(on_device);
  cudaSetDevice(previous);
  return error == cudaSuccess ? target : 0;
}

}  // namespace

std::string why_not_this_driver() {
  int driver = 0;  // stays 0 where no driver is installed
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "this machine has no NVIDIA driver";
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "the NVIDIA driver knows CUDA up to " + dotted(driver) + ", this was built with " + dotted(CUDART_VERSION);
}

std::vector<Device> devices() {
  int count = 0;
  if (cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    throw std::runtime_error("no usable GPU: " + why_no_gpu(error));
  }
  std::vector<Device> found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties{};
    Device device;
    if (cudaError_t error = cudaGetDeviceProperties(&properties, index); error != cudaSuccess) {
      device.problem = cudaGetErrorString(error);
    } else {
      device.name = properties.name;
      device.major = properties.major;
      device.minor = properties.minor;
      device.memory = properties.totalGlobalMem;
      device.target = run_report(index, device.problem);
    }
    found.push_back(device);
  }
  return found;
}

}  // namespace nunchaku_py::cuda
