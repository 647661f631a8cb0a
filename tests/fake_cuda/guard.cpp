// Answers for a GPU that is not there. Autograd asks whether a device has a context, before it asks
// for streams; a convolution asks whether cuDNN computes in bfloat16. The functions that tell are
// virtual and would look for a real device. A copy of their table takes its place, with both
// entries replaced.
#include <ATen/detail/CUDAHooksInterface.h>

#include <cstdint>
#include <cstring>

namespace {

using Hooks = at::CUDAHooksInterface;
constexpr std::ptrdiff_t kHead = 2;       // offset to the top and type information
constexpr std::ptrdiff_t kFunctions = 80;  // at least as many as the interface has

bool no_context(void*, c10::DeviceIndex) { return false; }
bool has_bfloat16(void*) { return true; }

// Its place in the table, by what the Itanium ABI says of pointers to members; -1 if it is none.
template <typename Member>
std::ptrdiff_t place(Member member) {
  std::intptr_t offset;  // in bytes, plus 1 for a virtual function
  std::memcpy(&offset, &member, sizeof offset);
  return offset % 2 ? (offset - 1) / static_cast<std::ptrdiff_t>(sizeof(void*)) : -1;
}

}  // namespace

// 0, or 1 if the functions are not where they should be.
extern "C" int install_guard() {
  const auto context = place(&Hooks::hasPrimaryContext);
  const auto bfloat16 = place(&Hooks::supportsBFloat16ConvolutionWithCuDNNv8);
  if (context < 0 || bfloat16 < 0 || context >= kFunctions || bfloat16 >= kFunctions) return 1;

  auto& hooks = const_cast<Hooks&>(at::detail::getCUDAHooks());
  void*** object = reinterpret_cast<void***>(&hooks);
  void** copy = new void*[kHead + kFunctions];
  std::memcpy(copy, *object - kHead, sizeof(void*) * (kHead + kFunctions));
  copy[kHead + context] = reinterpret_cast<void*>(&no_context);
  copy[kHead + bfloat16] = reinterpret_cast<void*>(&has_bfloat16);
  *object = copy + kHead;
  return 0;
}
