// What every launch needs: the device, and errors.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace zokern {
namespace {

std::string describe(cudaError_t status) {
    return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // forgets it: the next launch must not be blamed
    throw std::runtime_error(std::string(what) + " failed with " + describe(status));
}

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : device_(device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() {
        // Only where needed: cudaSetDevice makes a context on a device that has none.
        if (before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    const int device_;
    int before_ = 0;
};

}  // namespace
}  // namespace zokern
