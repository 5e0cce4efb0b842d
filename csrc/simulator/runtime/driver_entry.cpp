#include "simulator/runtime/driver_entry.h"

#include "simulator/runtime/api.h"
#include "simulator/runtime/tensor_map_encode.h"

namespace fused_peft::sim {
namespace {

struct DriverFunction {
  std::string_view name;
  void* address;
};

int driver_get_version(int* version) { return *version = CUDART_VERSION, 0; }

const DriverFunction kDriverFunctions[] = {
    {"cuDriverGetVersion", reinterpret_cast<void*>(&driver_get_version)},
    {"cuTensorMapEncodeTiled", tensor_map_encode_tiled()},
};

}  // namespace

void* find_driver_function(std::string_view name) {
  for (const DriverFunction& function : kDriverFunctions)
    if (function.name == name) return function.address;
  return nullptr;
}

}  // namespace fused_peft::sim

using namespace fused_peft::sim;

FUSED_PEFT_SIM_API cudaError_t
cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                 cudaDriverEntryPointQueryResult* status) {
  *function = find_driver_function(symbol);
  if (status)
    *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (!*function) stop_unimplemented("cudaGetDriverEntryPointByVersion", symbol);
  return cudaSuccess;
}
