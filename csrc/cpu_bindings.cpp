// The module gpt2._cpu_kernels: the operations of cpu_kernels.h on the addresses of contiguous
// tensors. Only gpt2/cpu.py imports it, and it checks shapes and types; nothing here does.

#include "cpu_kernels.h"

#include <pybind11/pybind11.h>

#include <string>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

using Address = uintptr_t;
using Size = int64_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Memory that was freed is used again instead of going back to the system, whose fresh pages cost
// more than what is computed in them. False where there is no such switch.
bool keep_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, -1) && mallopt(M_TOP_PAD, 64 << 20);
#else
  return false;
#endif
}

template <typename T>
void add(pybind11::module_& m, const char* suffix) {
  const auto define = [&](const char* name, auto function) {
    m.def((std::string(name) + suffix).c_str(), function,
          pybind11::call_guard<pybind11::gil_scoped_release>());
  };
  define("gelu_", [](Address x, Address y, Size n, int threads) {
    gelu(at<const T>(x), at<T>(y), n, threads);
  });
  define("gelu_backward_", [](Address x, Address dy, Address dx, Size n, int threads) {
    gelu_backward(at<const T>(x), at<const T>(dy), at<T>(dx), n, threads);
  });
  define("cross_entropy_", [](Address z, Address targets, Address losses, Size rows, Size n_classes,
                              Size n, bool gradient, int threads) {
    cross_entropy(at<T>(z), at<const int64_t>(targets), at<float>(losses), rows, n_classes, n,
                  gradient, threads);
  });
  define("attention_", [](Address qkv, Address start, Address out, Address lse, Size B, Size length,
                          Size H, Size D, int threads) {
    attention(at<const T>(qkv), at<const int32_t>(start), at<T>(out), at<float>(lse), B, length, H,
              D, threads);
  });
  define("attention_backward_",
         [](Address qkv, Address start, Address out, Address dout, Address lse, Address dqkv,
            Size B, Size length, Size H, Size D, int threads) {
           attention_backward(at<const T>(qkv), at<const int32_t>(start), at<const T>(out),
                              at<const T>(dout), at<const float>(lse), at<T>(dqkv), B, length, H,
                              D, threads);
         });
  define("decode_", [](Address weights, Address x, Address cache, Address start, Address logits,
                       Size n_layer, Size B, Size H, Size C, Size capacity, Size length,
                       Size n_classes, int threads) {
    decode<T>(at<const void* const>(weights), at<float>(x), at<float>(cache),
              at<const int32_t>(start), at<float>(logits), n_layer, B, H, C, capacity, length,
              n_classes, threads);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu_kernels, m) {
  m.doc() = "Kernels for CPUs; see csrc/cpu_kernels.h.";
  m.attr("sources") = SOURCES;
  add<float>(m, "float32");
  add<bfloat16>(m, "bfloat16");
  m.def("keep_memory", &keep_memory);
}
