// Lets autograd believe that no CUDA device has a context, so that it asks none for its streams.
// The virtual function that tells would look for real devices. A copy of the table of virtual
// functions, with this entry replaced, takes the place of the hooks' own.
#include <ATen/detail/CUDAHooksInterface.h>

#include <cstdint>
#include <cstring>

namespace {
bool no_context(void*, c10::DeviceIndex) { return false; }
}  // namespace

// 0, or 1 if the pointer to the function is not what the Itanium ABI says.
extern "C" int install_guard() {
  constexpr std::ptrdiff_t kHead = 2;    // offset to the top and type information
  constexpr std::ptrdiff_t kAfter = 40;  // more functions than are declared behind it
  bool (at::CUDAHooksInterface::*function)(c10::DeviceIndex) const =
      &at::CUDAHooksInterface::hasPrimaryContext;
  std::intptr_t offset;  // in bytes, plus 1 for a virtual function
  std::memcpy(&offset, &function, sizeof offset);
  if (offset % 2 == 0) return 1;
  const std::ptrdiff_t entry = (offset - 1) / static_cast<std::ptrdiff_t>(sizeof(void*));

  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  void*** object = reinterpret_cast<void***>(&hooks);
  void** copy = new void*[kHead + entry + kAfter];
  std::memcpy(copy, *object - kHead, sizeof(void*) * (kHead + entry + kAfter));
  copy[kHead + entry] = reinterpret_cast<void*>(&no_context);
  *object = copy + kHead;
  return 0;
}
